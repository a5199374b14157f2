"""Corpus speed: JSONL.zst to Parquet partitions, one core. `python -m benchmarks.corpus --corpus DIR`."""

import argparse
import json
import tempfile
import time
from pathlib import Path

import pyarrow as pa

from dataprep import manifest
from dataprep.config import CorpusConfig
from dataprep.corpus import build_group
from dataprep.storage import Attempt, UserError


def measure(files: list[Path], repeats: int) -> dict[str, float]:
    """File name -> MB of text per second of wall time, the median of `repeats` after one run to warm up.

    `total_mb_s_core`: all text over the time it took at those rates.
    """
    pa.set_cpu_count(1)
    speeds: dict[str, float] = {}
    megabytes = seconds = 0.0
    for file in files:
        config = CorpusConfig.model_validate({"sources": [{"name": "x", "paths": [str(file)]}]})
        entries, _ = manifest.update([], manifest.list_inputs(config), float("inf"))
        rates = []
        for _ in range(repeats + 1):
            with tempfile.TemporaryDirectory() as out:
                began = time.perf_counter()
                counts = build_group(Attempt(out, "0", {}), entries, config.sources[0], config)
                rates.append(counts["bytes"]["x"] / 1e6 / (time.perf_counter() - began))
        rate = sorted(rates[1:])[repeats // 2]
        speeds[file.name.removesuffix(".jsonl.zst")] = rate
        megabytes, seconds = megabytes + counts["bytes"]["x"] / 1e6, seconds + counts["bytes"]["x"] / 1e6 / rate
    return speeds | {"total_mb_s_core": megabytes / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", required=True, help="directory of .jsonl.zst files")
    parser.add_argument("--quick", action="store_true", help="the four smallest files, once")
    parser.add_argument("--json", help="write the figures there")
    arguments = parser.parse_args()
    files = sorted(Path(arguments.corpus).glob("*.jsonl.zst"), key=lambda f: f.stat().st_size)
    if not files:
        raise UserError(f"{arguments.corpus} holds no .jsonl.zst files")
    print(f"{len(files)} files, one process, one core; takes about 8 s per 100 MB of text")
    speeds = measure(files[:4] if arguments.quick else files, 1 if arguments.quick else 3)
    for name, speed in sorted(speeds.items()):
        print(f"{name:40} {speed:7.1f} MB/s")
    slowest = min(speeds, key=lambda name: speeds[name])
    print(f"slowest: {slowest}, {speeds[slowest]:.1f} MB/s")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"slowest_source_mb_s_core": speeds[slowest], **speeds}))


if __name__ == "__main__":
    main()
