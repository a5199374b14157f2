"""The hash behind every random choice of the mixer: of (seed, step, document, copy), never a generator's state."""

import numpy as np
import xxhash

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hashed(seed: int, step: str, *keys: np.ndarray) -> np.ndarray:
    """A uniform uint64 for each row of `keys` (integer arrays of one length), different for every seed and step."""
    mixed = np.full(len(keys[0]), xxhash.xxh3_64_intdigest(f"{seed}:{step}".encode()), np.uint64)
    for key in keys:
        mixed = _splitmix64(mixed ^ key.astype(np.uint64))
    return mixed


def _splitmix64(value: np.ndarray) -> np.ndarray:
    value = value + GOLDEN
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
