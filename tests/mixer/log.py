"""A small shard log for tests of reading: random rows whose segments are known."""

from collections.abc import Sequence

import numpy as np

from dataprep.storage import Attempt
from mixer.shards import SEGMENT, StageInfo, shard_key, write_end, write_shard

SIZES = (70, 0, 33, 64)


def stage(context: int = 4096, dtype: str = "uint16", compression: str = "zstd") -> StageInfo:
    return StageInfo(
        "main", 0, context, 1e4, 10**6, 50_000, 3, dtype, ("web",), ("low", "medium", "high"),
        ("short", "medium", "long"), "tok", "plan", len(SIZES), compression=compression,
    )  # fmt: skip


def sequences(n: int, info: StageInfo, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random rows; each has 0 to 4 segments."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50_000, (n, info.context)).astype(info.dtype)
    counts = rng.integers(0, 5, n)
    segments = np.zeros(counts.sum(), SEGMENT)
    segments["sequence"] = np.repeat(np.arange(n), counts)
    segments["length"] = rng.integers(1, info.context // 5, len(segments))
    for row in range(n):
        here = segments["sequence"] == row
        segments["start"][here] = np.cumsum(segments["length"][here]) - segments["length"][here]
    for name in ("doc", "offset", "copy", "source", "tier", "length_class"):
        limit = min(np.iinfo(SEGMENT[name]).max, (1 << 63) - 1)
        segments[name] = rng.integers(0, limit, len(segments), dtype=np.uint64)
    return tokens, segments


def write(directory: str, shard: int, info: StageInfo, size: int) -> None:
    out = Attempt(directory, shard_key(shard), {})
    write_shard(out, *sequences(size, info, shard), info)
    out.commit({"sequences": size})


def write_log(directory: str, info: StageInfo, sizes: Sequence[int] = SIZES) -> None:
    """A whole stage, ended."""
    info.save(directory)
    for shard, size in enumerate(sizes):
        write(directory, shard, info, size)
    write_end(directory, sizes, {})


def expected(info: StageInfo, sizes: Sequence[int] = SIZES) -> tuple[np.ndarray, np.ndarray]:
    """All sequences of the log: (tokens, segments numbered from 0 over all)."""
    tokens, segments, before = [], [], 0
    for shard, size in enumerate(sizes):
        t, s = sequences(size, info, shard)
        s["sequence"] += before
        before += size
        tokens.append(t)
        segments.append(s)
    return np.concatenate(tokens), np.concatenate(segments)


def rows(segments: np.ndarray, start: int, stop: int) -> np.ndarray:
    part = segments[(segments["sequence"] >= start) & (segments["sequence"] < stop)].copy()
    part["sequence"] -= start
    return part
