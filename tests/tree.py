"""What a directory of outputs holds, for comparing runs byte by byte."""

import hashlib
import os
from pathlib import Path

NOT_OUTPUT = (".lock", "heartbeat.json")


def tree(root: Path | str) -> dict[str, str]:
    """Relative path -> digest of every file under a root, except locks and heartbeats."""
    root = Path(root)
    files = (f for f in sorted(root.rglob("*")) if f.is_file() and f.name not in NOT_OUTPUT)
    return {str(f.relative_to(root)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def commits(root: Path | str) -> int:
    """How many commits lie under a root that a job may be writing (and sweeping) right now."""
    return sum(name.endswith(".commit.json") for _, _, names in os.walk(root) for name in names)
