"""What deduplication needs to know of every document: hashes of its bytes, its place in keeper order, its band keys."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from dataprep.storage import array_buffers, hash_halves, runs
from dedup.config import DedupConfig
from kernels import minhash, words

SCHEMA = pa.schema(
    {
        "doc": pa.uint64(),
        "source": pa.dictionary(pa.int32(), pa.string()),
        "rank": pa.uint64(),
        "hash_low": pa.uint64(),
        "hash_high": pa.uint64(),
        "length": pa.uint64(),
        "n_words": pa.uint32(),
        "bands": pa.large_list(pa.uint64()),
    }
)
BATCH_BYTES = 1 << 20  # of text scanned at a time: bounds the word hashes in memory
AGAINST_BITS, SOURCE_BITS, LENGTH_BITS = 1, 16, 47  # of a rank: one for each rule that may be in it
FILE_SHIFT = np.uint64(40)  # doc = file << 40 | record


def signatures(documents: pa.Table, config: DedupConfig) -> pa.Table:
    """One row per document (columns doc, source, text, content_hash are read), in the same order.

    rank: keeper order, lower is better, ties go to the lower doc. hash_low, hash_high: the halves of content_hash.
    length: bytes of text. n_words: words under the candidate folding. bands: one key per band, none for documents of
    fewer words than a shingle and where near duplicates are not wanted. Where sources are deduplicated each by itself,
    hash_low and bands also depend on the source, so that no bucket holds two sources.
    """
    _, offsets = array_buffers(documents["text"])
    length = np.diff(offsets).astype(np.uint64)
    hashes = hash_halves(documents["content_hash"])
    source = documents["source"].cast(pa.string()).combine_chunks()
    salt = _salts(source, config)
    n_words, bands = _bands(documents["text"], salt, config)
    columns = [
        documents["doc"].combine_chunks(),
        source.dictionary_encode(),
        pa.array(_ranks(documents["doc"].to_numpy(), source, length, config)),
        pa.array(hashes[:, 0] ^ salt),
        pa.array(hashes[:, 1]),
        pa.array(length),
        pa.array(n_words),
        bands,
    ]
    return pa.table(columns, schema=SCHEMA)


def _salts(source: pa.Array, config: DedupConfig) -> np.ndarray:
    """uint64[documents]: a hash of each one's source where sources do not mix, else zeros."""
    if config.scope == "across":
        return np.zeros(len(source), np.uint64)
    encoded = source.dictionary_encode()
    hashes = [xxhash.xxh3_64_intdigest(name.encode()) for name in encoded.dictionary.to_pylist()]
    return np.array(hashes, np.uint64)[encoded.indices.to_numpy()]


def _ranks(docs: np.ndarray, source: pa.Array, length: np.ndarray, config: DedupConfig) -> np.ndarray:
    """uint64[documents]: what decides keeper order, each in its bits, the weightiest on top."""
    rank = (docs >> FILE_SHIFT >= np.uint64(config.against)).astype(np.uint64)
    for rule in config.keeper:
        if rule == "source":
            place = pc.index_in(source, value_set=pa.array(config.source_priority, pa.string()))
            value = place.fill_null(len(config.source_priority)).to_numpy().astype(np.uint64)
            rank = rank << np.uint64(SOURCE_BITS) | value
        elif rule == "length":
            most = np.uint64((1 << LENGTH_BITS) - 1)
            rank = rank << np.uint64(LENGTH_BITS) | (most - np.minimum(length, most))
    return rank  # "oldest" needs no bits: ties go to the lower doc


def _bands(text: pa.ChunkedArray, salt: np.ndarray, config: DedupConfig) -> tuple[np.ndarray, pa.LargeListArray]:
    """(words per document uint32, band keys per document)."""
    bands, rows = config.layout
    multipliers, addends = minhash.permutations(bands * rows, config.seed)
    counts, keys = [np.zeros(0, np.uint32)], [np.zeros((0, bands), np.uint64)]
    for data, offsets in batches(text, BATCH_BYTES):
        hashes, word_offsets = words.word_hashes(data, offsets, "candidate")
        counts.append(np.diff(word_offsets).astype(np.uint32))
        minima = minhash.signatures(hashes, word_offsets, config.shingle, multipliers, addends)
        keys.append(minhash.band_keys(minima, bands, rows, config.seed))
    n_words = np.concatenate(counts)
    comparable = (n_words >= config.shingle) & config.near
    list_offsets = np.concatenate([[0], np.cumsum(comparable * bands)])
    values = (np.concatenate(keys) ^ salt[:, None])[comparable].ravel()
    return n_words, pa.LargeListArray.from_arrays(pa.array(list_offsets, pa.int64()), pa.array(values))


def batches(text: pa.ChunkedArray, batch_bytes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(bytes, offsets) of runs of documents: about batch_bytes each, or one longer document. No copy."""
    for chunk in text.chunks:
        data, offsets = array_buffers(chunk)
        for start, stop in runs(offsets, batch_bytes):
            yield data, offsets[start : stop + 1]
