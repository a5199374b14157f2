"""Finding given phrases (runs of words) in documents, whatever their case, punctuation and spacing."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from dataprep import storage
from dataprep.storage import array_buffers
from kernels.membership import bitmap, members
from kernels.minhash import shingles
from kernels.words import word_hashes

CHUNK = 16 << 20  # bytes of text whose word hashes are in memory at a time


class Phrases:
    """A set of phrases, each known by the hash of its words (under deduplication's verification folding).

    keys: their hashes, uint64, sorted, without repeats. lengths: how many words the phrases have.
    """

    def __init__(self, keys: np.ndarray, lengths: set[int]):
        self.keys, self.lengths = np.unique(keys), sorted(lengths)
        self._bits = bitmap(self.keys)

    @classmethod
    def of(cls, texts: list[str]) -> "Phrases":
        """Each text is one phrase; those without a word are passed over."""
        words, offsets = hashes(pa.array(texts, pa.large_string()))
        counts = np.diff(offsets)
        lengths = set(counts.tolist()) - {0}
        keys = [runs(words, offsets, n, counts == n)[0] for n in sorted(lengths)]
        return cls(np.concatenate([np.zeros(0, np.uint64), *keys]), lengths)

    def find(self, text: pa.ChunkedArray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(documents, keys): where every occurrence is, and of which phrase (a place in `keys`); int64, in pieces."""
        data, offsets = array_buffers(text)
        for first, end in storage.runs(offsets, CHUNK):
            words, word_offsets = word_hashes(data, offsets[first : end + 1], "verification")
            for n in self.lengths:
                values, value_offsets = shingles(words, word_offsets, n)
                places, found = members(values, self.keys, self._bits)
                yield first + np.searchsorted(value_offsets, places, side="right") - 1, found


def hashes(text: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(word hashes, where each text's begin)."""
    return word_hashes(*array_buffers(text), "verification")


def runs(words: np.ndarray, offsets: np.ndarray, n: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hash, text) of every run of n words in the chosen texts (bool): uint64 and int64."""
    values, value_offsets = shingles(words, offsets, n)
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(value_offsets))
    return values[chosen[owner]], owner[chosen[owner]]
