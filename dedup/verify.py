"""Exact Jaccard similarity of candidate pairs, over the sets of their shingles under the verification folding."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.storage import array_buffers, binary_array
from dedup.config import DedupConfig
from dedup.signatures import BATCH_BYTES, batches
from kernels import edges, minhash, words

SETS = pa.schema({"doc": pa.uint64(), "shingles": pa.large_binary()})


def shingle_sets(documents: pa.Table, docs: np.ndarray, config: DedupConfig) -> pa.Table:
    """(doc, shingles) of those documents (columns doc, text are read) that `docs` lists, in the documents' order.

    shingles: the set's 64-bit hashes, sorted, little-endian; about 1.3 bytes per byte of text.
    """
    wanted = documents.select(["doc", "text"]).filter(pc.is_in(documents["doc"], pa.array(docs, pa.uint64())))
    sets = []
    for data, text_offsets in batches(wanted["text"], BATCH_BYTES):
        hashes, offsets = words.word_hashes(data, text_offsets, "verification")
        values, offsets = minhash.shingles(hashes, offsets, config.shingle)
        for start, stop in pairwise(offsets):
            values[start:stop].sort()
        values, offsets = edges.distinct(values, offsets)
        sets.append(binary_array(values.view(np.uint8), offsets * 8))
    return pa.table([wanted["doc"], pa.chunked_array(sets, pa.large_binary())], schema=SETS)


def jaccard(pairs: pa.Table, sets: pa.Table, first_sets: pa.Table) -> np.ndarray:
    """float64[pairs]: shared over all shingles of each pair (doc, first); 0 where both sets are empty.

    sets, first_sets: shingle sets of at least the pairs' docs and firsts; a missing one raises KeyError.
    """
    rows_a, rows_b = _find(pairs["doc"], sets), _find(pairs["first"], first_sets)
    (values_a, offsets_a), (values_b, offsets_b) = _values(sets), _values(first_sets)
    shared = edges.intersections(values_a, offsets_a, rows_a, values_b, offsets_b, rows_b)
    union = np.diff(offsets_a)[rows_a] + np.diff(offsets_b)[rows_b] - shared
    return shared / np.maximum(union, 1)


def verify(pairs: pa.Table, sets: pa.Table, first_sets: pa.Table, threshold: float) -> pa.Table:
    """The pairs (doc, first) whose Jaccard similarity reaches the threshold, with a column jaccard (float64)."""
    # Sets of very different sizes cannot be alike; to skip them keeps one huge document in many pairs harmless.
    size = pc.binary_length(sets["shingles"]).to_numpy()[_find(pairs["doc"], sets)]
    first_size = pc.binary_length(first_sets["shingles"]).to_numpy()[_find(pairs["first"], first_sets)]
    possible = np.minimum(size, first_size) / np.maximum(np.maximum(size, first_size), 1) >= threshold
    pairs = pairs.filter(pa.array(possible))
    similarity = jaccard(pairs, sets, first_sets)
    return pairs.append_column("jaccard", pa.array(similarity, pa.float64())).filter(pa.array(similarity >= threshold))


def _find(docs: pa.ChunkedArray, sets: pa.Table) -> np.ndarray:
    """The row in `sets` of each doc."""
    rows = pc.index_in(docs, value_set=sets["doc"])
    if rows.null_count:
        raise KeyError(f"no shingle set for document {docs.filter(rows.is_null())[0]}")
    return rows.to_numpy().astype(np.int64)


def _values(sets: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 values, int64 offsets) of the sets."""
    data, offsets = array_buffers(sets["shingles"])
    return data[: len(data) // 8 * 8].view(np.uint64), offsets // 8
