"""A corpus file as people keep them: JSON lines, compressed."""

import json
from collections.abc import Iterable
from pathlib import Path

import zstandard


def write(folder: Path, name: str, documents: Iterable[dict]) -> None:
    """NAME.jsonl.zst in a folder."""
    lines = "".join(json.dumps(document) + "\n" for document in documents)
    (folder / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
