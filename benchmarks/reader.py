"""Reading shards beside numpy's memmap of flat tokens; opening a log of 1T tokens. `python -m benchmarks.reader`."""

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


def write_trillion(directory: str, ended: bool) -> int:
    """A log of 1T tokens: all its commits, and the one shard in its middle that will be read. Its sequences."""
    rows, info = SHARD_TOKENS // CONTEXT, stage()
    info.save(directory)
    out = Attempt(directory, shard_key(COMMITS // 2), {})
    write_shard(out, np.broadcast_to(np.zeros(1, info.dtype), (rows, CONTEXT)), segments(rows, 2), info)
    cells = [
        {"source": s, "tier": t, "length_class": c, "tokens": 10**7}
        for s in info.sources
        for t in info.tiers
        for c in info.classes
    ]
    out.commit({"sequences": rows, "cells": cells})
    commit = Path(directory) / f"{shard_key(COMMITS // 2)}.commit.json"
    for shard in range(COMMITS):
        commit.with_name(f"{shard_key(shard)}.commit.json").write_bytes(commit.read_bytes())
    if ended:
        write_end(directory, [rows] * COMMITS, {})
    return rows * COMMITS


def open_in_the_middle(directory: str, total: int) -> tuple[float, float]:
    """Seconds, and MB of memory beyond what the imports took at their peak."""
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


def in_a_fresh_process(directory: str, total: int) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(open_in_the_middle, (directory, total))


def speeds(read: Callable[[int, int], np.ndarray], sequences: int) -> list[float]:
    """Million tokens/s of CPU time, files in the page cache: steps in order, and single sequences anywhere."""
    places = np.random.default_rng(1).integers(0, sequences, 300).tolist()
    in_order = [(first, min(first + STEP, sequences)) for first in range(0, sequences, STEP)]

    def rate(spans: list[tuple[int, int]]) -> float:
        seconds = cpu_seconds(lambda: deque((read(*span) for span in spans), maxlen=0), 2)  # keeps none of them
        return sum(b - a for a, b in spans) * CONTEXT / 1e6 / seconds

    return [rate(in_order), rate([(place, place + 1) for place in places])]


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
            for compression in ("zstd", "none"):
                size = write_log(f"{directory}/{compression}", tokens, stage(dtype, compression))
                log = ShardLog(f"{directory}/{compression}")
                log.wait(1)
                found = speeds(lambda a, b, log=log: log.read(a, b).tokens, sequences)
                rows.append((f"{dtype}, {compression}, {size / tokens.nbytes:.0%} of its bytes", *found))
                if dtype == "uint16":
                    figures[f"tokens_s_{'zstd' if compression == 'zstd' else 'raw'}"] = found[0] * 1e6
            flat = Path(directory) / "flat.bin"
            tokens.tofile(flat)
            peer = np.memmap(flat, dtype, "r").reshape(tokens.shape)
            found = speeds(lambda a, b, peer=peer: np.array(peer[a:b]), sequences)
            rows.append((f"{dtype}, memmap (nothing verified)", *found))
            figures[f"memmap_{dtype}"] = found[0] * 1e6
    names = ("million tokens/s", "in order", "one sequence anywhere")
    table("", names, [(name, *(f"{speed:,.0f}" for speed in found)) for name, *found in rows])
    for ended in (True, False):
        with tempfile.TemporaryDirectory(prefix="reader-") as directory:
            total = write_trillion(directory, ended)
            seconds, memory = in_a_fresh_process(directory, total)
            name = "ended" if ended else "still being packed"
            print(f"1T tokens, {COMMITS:,} commits, {name}: opened, one sequence: {seconds:.2f} s, {memory:.0f} MB")
            figures["open_1t_s"] = max(seconds, figures.get("open_1t_s", 0.0))
            figures["open_1t_mb"] = max(memory, figures.get("open_1t_mb", 0.0))
    report(arguments.json, figures)


if __name__ == "__main__":
    main()
