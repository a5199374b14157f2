"""Small corpora with planted duplicates, and the whole of deduplication as plain functions in a row."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from dedup.candidates import bucket_rows, pairs
from dedup.config import DedupConfig
from dedup.keepers import choose
from dedup.signatures import signatures
from dedup.verify import shingle_sets, verify
from kernels.words import reference_words


def table(texts: list[str], sources: list[str] | None = None, docs: list[int] | None = None) -> pa.Table:
    """Documents as in contract 1, as far as deduplication reads them."""
    hashes = [xxhash.xxh3_128_digest(t.replace("\r\n", "\n").replace("\r", "\n").encode()) for t in texts]
    return pa.table(
        {
            "doc": pa.array(range(len(texts)) if docs is None else docs, pa.uint64()),
            "source": pa.array(sources or ["web"] * len(texts), pa.string()).dictionary_encode(),
            "text": pa.array(texts, pa.large_string()),
            "content_hash": pa.array(hashes, pa.binary(16)),
        }
    )


def dedup(documents: pa.Table, config: DedupConfig) -> pa.Table:
    """The removed documents."""
    signed = signatures(documents, config)
    found = pairs(bucket_rows(signed))
    near = found.filter(pc.invert(found["exact"]))
    sets = shingle_sets(documents, np.union1d(near["doc"].to_numpy(), near["first"].to_numpy()), config)
    return choose(found.filter(found["exact"]), verify(near, sets, sets, config.threshold), signed)


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = list(reference_words(text, "verification"))
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / max(len(a | b), 1)


def planted(random: np.random.Generator, count: int, alphabet: list[str], space: str = " ") -> list[str]:
    """`count` texts of 60-200 words, two thirds of them earlier texts with up to three of their words changed."""
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and random.random() < 0.67:
            words = list(texts[random.integers(len(texts))])
            for place in random.integers(0, len(words), random.integers(0, 4)):
                words[place] = str(random.choice(alphabet))
        else:
            words = random.choice(alphabet, random.integers(60, 200)).tolist()
        texts.append(words)
    return [space.join(words) for words in texts]
