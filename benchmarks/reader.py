"""Reading shards beside numpy's memmap of flat tokens; opening a log of 1T tokens. `python -m benchmarks.reader`."""

import itertools
import multiprocessing
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.common import about, cpu_seconds, parser, report, table
from dataprep.storage import Attempt
from mixer.reader import ShardLog
from mixer.shards import SEGMENT, StageInfo, shard_key, write_end, write_shard

CONTEXT = 8192
STEP = 64  # sequences of one global batch: 512K tokens
COMMITS, SHARD_TOKENS = 4000, 250_000_000  # together 1 trillion tokens
DTYPES = {"uint16": 65_000, "uint32": 200_000}  # and a vocabulary that needs it


def stage(dtype: str = "uint16", compression: str = "zstd") -> StageInfo:
    return StageInfo(
        "main", 0, CONTEXT, 1e4, 10**12, DTYPES[dtype], 0, dtype, ("web", "books", "code", "wiki"),
        ("low", "medium", "high"), ("short", "medium", "long"), "tokenizer", "plan", 1, compression=compression,
    )  # fmt: skip


def segments(sequences: int, each: int) -> np.ndarray:
    """`each` documents of equal length in every sequence."""
    found = np.zeros(sequences * each, SEGMENT)
    found["sequence"] = np.repeat(np.arange(sequences), each)
    found["length"] = CONTEXT // each
    found["start"] = np.tile(np.arange(each) * (CONTEXT // each), sequences)
    found["doc"] = np.random.default_rng(0).integers(0, 1 << 50, len(found))
    return found


def write_log(directory: str, tokens: np.ndarray, info: StageInfo) -> int:
    """A stage of one shard; its bytes."""
    info.save(directory)
    out = Attempt(directory, shard_key(0), {})
    write_shard(out, tokens, segments(len(tokens), 5), info)
    write_end(directory, [len(tokens)], {})
    return out.commit({"sequences": len(tokens)}).bytes


def write_trillion(directory: str) -> int:
    """A log of 1T tokens, still being packed: all its commits, and the one shard that will be read. Its sequences."""
    rows, info = SHARD_TOKENS // CONTEXT, stage()
    info.save(directory)
    out = Attempt(directory, shard_key(COMMITS // 2), {})
    write_shard(out, np.broadcast_to(np.zeros(1, info.dtype), (rows, CONTEXT)), segments(rows, 2), info)
    cells = itertools.product(info.sources, info.tiers, info.classes)
    names = ("source", "tier", "length_class", "tokens")
    out.commit({"sequences": rows, "cells": [dict(zip(names, (*cell, 10**7), strict=True)) for cell in cells]})
    commit = Path(directory) / f"{shard_key(COMMITS // 2)}.commit.json"
    for shard in range(COMMITS):
        commit.with_name(f"{shard_key(shard)}.commit.json").write_bytes(commit.read_bytes())
    return rows * COMMITS


def open_in_the_middle(directory: str, total: int) -> tuple[float, float]:
    """In a fresh process: seconds, and MB of memory beyond what the imports took at their peak."""
    before = peak_mb()
    began = time.perf_counter()
    log = ShardLog(directory)
    assert log.wait(total) == total
    assert log.read(total // 2 + 5, total // 2 + 6).tokens.shape == (1, CONTEXT)
    seconds = time.perf_counter() - began
    return seconds, peak_mb() - before


def peak_mb() -> float:
    """The most memory that this process has had. (Its ru_maxrss would begin with its parent's.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def speed(read: Callable[[int, int], np.ndarray], sequences: int) -> float:
    """Tokens/s of CPU time, files in the page cache, step after step."""
    steps = range(0, sequences, STEP)
    seconds = cpu_seconds(lambda: deque((read(k, min(k + STEP, sequences)) for k in steps), maxlen=0), 2)  # keeps none
    return sequences * CONTEXT / seconds


def main() -> None:
    arguments = parser(__doc__, reads_corpus=False).parse_args()
    sequences = 2048 if arguments.quick else 16384
    millions, size = sequences * CONTEXT / 1e6, sequences * CONTEXT * 11 / 1e9
    print(f"{millions:,.0f}M Zipf-distributed tokens in the page cache, one thread, its CPU time; {about('xxhash')}")
    print(f"takes {'20 seconds' if arguments.quick else 'a minute'}, and {size:.1f} GB of disk for a while")
    pa.set_cpu_count(1)
    figures: dict[str, float] = {}
    rows = []
    for dtype, vocabulary in DTYPES.items():
        tokens = np.minimum(np.random.default_rng(0).zipf(1.2, (sequences, CONTEXT)), vocabulary - 1).astype(dtype)
        with tempfile.TemporaryDirectory(prefix="reader-") as directory:
            for name, compression in (("zstd", "zstd"), ("raw", "none")):
                size = write_log(f"{directory}/{name}", tokens, stage(dtype, compression))
                log = ShardLog(f"{directory}/{name}")
                log.wait(1)
                found = speed(lambda a, b, log=log: log.read(a, b).tokens, sequences)
                figures["tokens_s_" + name + ("" if dtype == "uint16" else "_uint32")] = found
                rows.append((f"{dtype}, {name}, {size / tokens.nbytes:.0%} of its bytes", f"{found / 1e6:,.0f}"))
            flat = Path(directory) / "flat.bin"
            tokens.tofile(flat)
            peer = np.memmap(flat, dtype, "r").reshape(tokens.shape)
            found = speed(lambda a, b, peer=peer: np.array(peer[a:b]), sequences)
            figures[f"memmap_{dtype}"] = found
            rows.append((f"{dtype}, memmap (nothing verified)", f"{found / 1e6:,.0f}"))
    table("in order", ("", "million tokens/s"), rows)
    with tempfile.TemporaryDirectory(prefix="reader-") as directory:
        total = write_trillion(directory)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory = pool.apply(open_in_the_middle, (directory, total))
    print(f"1T tokens, {COMMITS:,} commits, still being packed: opened, one sequence: {seconds:.2f} s, {memory:.0f} MB")
    report(arguments.json, figures | {"open_1t_s": seconds, "open_1t_mb": memory})


if __name__ == "__main__":
    main()
