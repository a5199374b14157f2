"""What the deduplication benchmarks share: their command line, and a directory of corpora as a configuration."""

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from dataprep.storage import UserError
from jobs.config import Config

os.environ.setdefault("RAY_worker_niceness", "0")  # our workers and the peers' at the same priority


def parser(description: str | None) -> argparse.ArgumentParser:
    """--corpus DIR, --quick and --json FILE."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--corpus", help="directory of .jsonl.zst files, their labels in labels/")
    parser.add_argument("--quick", action="store_true", help="less of everything: under a minute")
    parser.add_argument("--json", help="write the figures there, as one flat object")
    return parser


def sources(directory: str) -> dict[str, Path]:
    """Name -> file, smallest first."""
    files = sorted(Path(directory).glob("*.jsonl.zst"), key=lambda f: (f.stat().st_size, f.name))
    if not files:
        raise UserError(f"{directory} holds no .jsonl.zst files")
    return {f.name.removesuffix(".jsonl.zst"): f for f in files}


def configuration(root: str, files: dict[str, Path], workers: int, **dedup: Any) -> Config:
    """A pipeline over these sources in which no loss stops the job: benchmarks measure what would be lost."""
    return Config(
        root=root,
        workers=workers,
        corpus={"sources": [{"name": name, "paths": [str(path)]} for name, path in files.items()]},
        dedup={"max_source_loss": 1.0, **dedup},
        mix={"stages": [{"name": "none", "context": 128, "tokens": 1}]},
    )


def about(*packages: str) -> str:
    """The machine's cores and the versions that figures depend on."""
    versions = [f"{name} {metadata.version(name)}" for name in ("numba", "numpy", "pyarrow", "ray", *packages)]
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, {', '.join(versions)}"


def save(path: str | None, figures: dict[str, float]) -> None:
    if path:
        Path(path).write_text(json.dumps(figures, indent=1) + "\n")
