"""The merge kernel against the plain definition, on random merges and words of any length."""

import random

import numpy as np
import pytest

from kernels import merges


@pytest.mark.parametrize("seed", range(12))
def test_merges_as_by_the_book(seed: int) -> None:
    rng = random.Random(seed)
    letters = b"abc"[: 1 + seed % 3]
    tokens = {bytes([byte]): byte for byte in range(256)}
    pairs: dict[tuple[int, int], tuple[int, int]] = {}
    for _ in range(seed * 4):
        left, right = (rng.choice([*(t for t in tokens if len(t) > 1 or t[0] in letters)]) for _ in range(2))
        if (tokens[left], tokens[right]) not in pairs and len(left + right) < 40:
            number = tokens.setdefault(left + right, len(tokens) + 1000)
            pairs[tokens[left], tokens[right]] = (len(pairs), number)
    byte_ids = np.arange(256, dtype=np.uint32)
    ranked = np.array(list(pairs), np.uint32).reshape(-1, 2)
    merged = np.array([number for _, number in pairs.values()], np.uint32)
    table = merges.make(ranked, merged, byte_ids)
    scratch = np.empty((5, 1 << merges.POSITION_BITS), np.uint32)
    for size in (1, 2, 3, 7, 20, 100, 1023, 1024, 1025, 1400):
        word = bytes(rng.choices(letters, k=size))
        out = np.zeros(size + 2, np.uint32)
        count = merges.merge(np.frombuffer(b"x" + word, np.uint8), 1, size, table, scratch, out, 2)
        assert out[2:count].tolist() == merges.reference(word, list(range(256)), pairs), (size, word[:30])
