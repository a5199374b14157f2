"""Shingles (n-grams of words), MinHash signatures and band keys, from the word hashes of `kernels.words`.

A permutation is `a * x + b` modulo 2**32 with a odd, of a shingle's upper 32 bits: multiply-shift hashing, in which
the order is decided by the upper bits of the product. It cannot overflow and works on eight or sixteen lanes at once.
"""

import numpy as np

from kernels.jit import njit
from kernels.words import mix

EMPTY = np.uint32(0xFFFFFFFF)  # the minimum of no shingles
_BASE = np.uint64(0x9FB21C651E98DF2B)  # odd, as is (base - 1) / 2: swapped words change the hash
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_S32 = np.uint64(32)
_BLOCK = 512  # shingles hashed at a time: they stay in the first-level cache


def permutations(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(multipliers, addends), uint32[count] each: a hash of (seed, place)."""
    places = np.arange(2 * count, dtype=np.uint64) + np.uint64(1)
    bits = mix(places * _GOLDEN ^ mix(np.full(1, seed, np.uint64))) >> _S32
    return bits[:count].astype(np.uint32) | np.uint32(1), bits[count:].astype(np.uint32)


def reference_shingles(words: list[int], n: int) -> list[int]:
    """What `shingles` computes for one document."""
    found = []
    for i in range(len(words) - n + 1):
        value = 0
        for word in words[i : i + n]:
            value = (value * int(_BASE) + word) % 2**64
        found.append(int(mix(np.uint64(value))))
    return found


def reference_signature(words: list[int], n: int, multipliers: list[int], addends: list[int]) -> list[int]:
    """What `signatures` computes for one document."""
    values = [shingle >> 32 for shingle in reference_shingles(words, n)]
    permuted = ([(a * x + b) % 2**32 for x in values] for a, b in zip(multipliers, addends, strict=True))
    return [min(column, default=int(EMPTY)) for column in permuted]


@njit
def shingles(words, offsets, n):
    """The hashes of all runs of n words within a document: (uint64 hashes, int64 offsets), in order, repeats included.

    words: uint64 word hashes; offsets: int64, where each document's words begin, one more than documents.
    """
    counts = np.maximum(offsets[1:] - offsets[:-1] - (n - 1), 0)
    out_offsets = np.zeros(len(offsets), np.int64)
    out_offsets[1:] = np.cumsum(counts)
    out = np.empty(out_offsets[-1], np.uint64)
    for d in range(len(counts)):
        _shingles(words[offsets[d] : offsets[d + 1]], n, out[out_offsets[d] : out_offsets[d + 1]])
    return out, out_offsets


@njit
def _shingles(words, n, out):
    """out[i] = mix of the polynomial in words[i : i + n]."""
    for i in range(len(out)):
        value = words[i]
        for k in range(1, n):
            value = value * _BASE + words[i + k]
        out[i] = mix(value)


@njit
def signatures(words, offsets, n, multipliers, addends):
    """MinHash signatures: uint32[documents, permutations], EMPTY throughout for documents under n words.

    words, offsets: as in `shingles`; multipliers, addends: as made by `permutations`.
    """
    size = len(multipliers)
    minima = np.full((len(offsets) - 1, size), EMPTY, np.uint32)
    block, x = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint32)
    for d in range(len(offsets) - 1):
        for start in range(offsets[d], offsets[d + 1] - n + 1, _BLOCK):
            length = min(_BLOCK, offsets[d + 1] - n + 1 - start)
            _shingles(words[start : start + length + n - 1], n, block[:length])
            for i in range(length):
                x[i] = np.uint32(block[i] >> _S32)
            for p in range(size):  # shingles innermost: one minimum in registers, 16-21 G updates/s
                a, b, least = multipliers[p], addends[p], minima[d, p]
                for i in range(length):
                    least = min(least, np.uint32(a * x[i] + b))
                minima[d, p] = least
    return minima


@njit
def band_keys(minima, bands, rows, seed):
    """uint64[documents, bands]: the hash of each band's rows with the band's number."""
    keys = np.empty((len(minima), bands), np.uint64)
    for d in range(len(minima)):
        for b in range(bands):
            key = mix(np.uint64(seed) ^ (np.uint64(b) * _GOLDEN))
            for r in range(rows):
                key = mix(key ^ np.uint64(minima[d, b * rows + r]))
            keys[d, b] = key
    return keys
