"""Corpus speed: JSONL.zst to Parquet partitions, one core. `python -m benchmarks.corpus --corpus DIR`."""

import tempfile
from pathlib import Path

import pyarrow as pa

from benchmarks.common import medians, parser, report, sources, table
from dataprep import manifest
from dataprep.config import CorpusConfig
from dataprep.corpus import build_group
from dataprep.storage import Attempt


def measure(file: Path, runs: int) -> tuple[float, float]:
    """(megabytes of text, seconds of wall time)."""
    config = CorpusConfig.model_validate({"sources": [{"name": "x", "paths": [str(file)]}]})
    entries, _ = manifest.update([], manifest.list_inputs(config), float("inf"))
    found: dict = {}

    def build() -> None:
        with tempfile.TemporaryDirectory() as out:
            found.update(build_group(Attempt(out, "0", {}), entries, config.sources[0], config))

    seconds = medians({"build": build}, runs)["build"]
    return found["bytes"]["x"] / 1e6, seconds


def main() -> None:
    arguments = parser(__doc__).parse_args()
    files = sources(arguments.corpus, 4 if arguments.quick else None)
    print(f"{len(files)} files, one process, one core; takes about 8 s per 100 MB of text")
    pa.set_cpu_count(1)
    found = {name: measure(file, 1 if arguments.quick else 3) for name, file in files.items()}
    speeds = {name: size / seconds for name, (size, seconds) in found.items()}
    table("text read", ("source", "MB/s"), [(name, f"{speed:.1f}") for name, speed in sorted(speeds.items())])
    speeds["total_mb_s_core"] = sum(s for s, _ in found.values()) / sum(s for _, s in found.values())
    report(arguments.json, {"slowest_source_mb_s_core": min(speeds.values()), **speeds})


if __name__ == "__main__":
    main()
