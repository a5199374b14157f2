"""The report page of ten million documents: time, memory and size, from copied commits. `python -m benchmarks.report`.

The jobs run on 20 sources of 5,000 made-up documents; then every partition's commit is copied a hundred times, the
removed documents with it. Of each of two stages there are 400 shards' commits and 100,000 training steps.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
import zstandard

from benchmarks import common
from dataprep.storage import Attempt, read_json, read_table, write_json
from mixer.config import CLASSES

SOURCES = [f"source-{k:02d}" for k in range(20)]
STEPS = ("corpus", "dedup-signatures", "dedup", "quality", "tokens", "inventory")
COPIES, SHARDS, TRAINED = 100, 400, 100_000
LARGE = 100  # clusters that are not copied: those that the page shows have texts
CONFIG = {
    "workers": 2,
    "dedup": {"max_source_loss": 1.0},
    "quality": {"rules": [], "tiers": [{"by": "quantile", "low": 0.3, "high": 0.7}]},
    "tokens": {"vocab_size": 4096, "sample_mb": 2},
    "mix": {
        "thresholds": {"medium": 64, "long": 256},
        "shard_tokens": 65_536,
        "stages": [
            {"name": "base", "context": 512, "tokens": 300_000},
            {"name": "longer", "context": 2048, "tokens": 150_000},
        ],
    },
}


def write_source(path: Path, documents: int, seed: int) -> None:
    """Documents of a few to a few hundred words, one in five of them an earlier one, some with a word more."""
    rng, texts = np.random.default_rng(seed), []
    words = np.array([f"word{k}" for k in range(2000)])
    for length in np.clip(rng.lognormal(3.5, 1, documents), 6, 1000).astype(int):
        earlier = rng.random() < 0.2 and texts
        text = texts[rng.integers(len(texts)) // 2] if earlier else " ".join(words[rng.integers(0, 2000, length)])
        texts.append(text + " again" * int(rng.integers(2)))
    path.write_bytes(zstandard.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))


def newest(root: Path, step: str) -> Path:
    return root / read_json(str(root / "latest" / f"{step}.json"))["directory"]


def load(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.commit.json"))]


def save(directory: Path, commit: dict[str, Any], key: str) -> None:
    """A commit under another key. (The jobs' own way waits for the disk each time.)"""
    (directory / f"{key}.commit.json").write_text(json.dumps(commit | {"key": key}))


def copy_partitions(root: Path) -> None:
    """Every partition's commit COPIES times, as if of further input files."""
    for step in STEPS:
        commits = load(directory := newest(root, step))
        for number in range(len(commits), COPIES * len(commits)):
            commit = commits[number % len(commits)]
            if step == "dedup-signatures":
                commit["aggregates"]["first_doc"] = number << 40
            save(directory, commit, f"{number:05d}{commit['key'][5:]}")


def copy_removed(root: Path) -> None:
    """The removed documents and their clusters with them, but for the largest."""
    directory = newest(root, "dedup-verdicts")
    (commit,) = load(directory)
    tables = {name: read_table(str(directory / file["name"])) for name, file in commit["files"].items()}
    large = tables["clusters"]["cluster"][:LARGE].combine_chunks()
    out = Attempt(str(directory), commit["key"], commit["inputs"])
    for name, columns in (("removed", ("doc", "keeper", "cluster")), ("clusters", ("cluster",))):
        copies = [tables[name]]
        rest = tables[name].filter(pc.invert(pc.is_in(tables[name]["cluster"], large)))
        for number in range(1, COPIES):
            copy = rest
            for column in columns:
                moved = pa.array(rest[column].to_numpy() + np.uint64(number * len(SOURCES) << 40))
                copy = copy.set_column(copy.schema.get_field_index(column), column, moved)
            copies.append(copy)
        out.table(name, pa.concat_tables(copies))
    out.commit(commit["aggregates"])


def copy_stage(root: Path, number: int, name: str, shards: int, steps: int) -> None:
    """A stage's commits up to so many shards, and a trainer's metrics."""
    directory = newest(root, f"pack-{name}")
    commits, end = load(directory), read_json(str(directory / "end.json"))
    for shard in range(len(commits), shards):
        save(directory, commits[shard % len(commits)], f"{shard:05d}")
    each = [end["shard_sequences"][shard % len(commits)] for shard in range(shards)]
    write_json(str(directory / "end.json"), end | {"shards": shards, "shard_sequences": each, "sequences": sum(each)})
    folder, rng = root / "train-0123456789ab" / name, np.random.default_rng(number)
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step, loss in enumerate(2 + rng.random(steps), number * steps + 1):
            record = {"step": step, "tokens": step * 4_000_000, "sequences": 512, "loss": loss, "gradient": 0.3,
                      "lr": 1e-4, "tokens_per_second": 1e6, "mfu": 0.4, "expert_load": [[1.0] * 8] * 4,
                      "sources": dict.fromkeys(SOURCES, loss), "classes": dict.fromkeys(CLASSES, loss)}  # fmt: skip
            file.write(json.dumps(record) + "\n")
    write_json(str(root / "latest" / "train.json"), {"directory": "train-0123456789ab"})


def main() -> None:
    arguments = common.parser(__doc__, reads_corpus=False).parse_args()
    part = 10 if arguments.quick else 1
    print(f"a few minutes (--quick: one), most of it to make the commits; {common.about('plotly')}")
    with tempfile.TemporaryDirectory() as folder:
        root, paths = Path(folder) / "root", {name: Path(folder, f"{name}.jsonl.zst") for name in SOURCES}
        for seed, path in enumerate(paths.values()):
            write_source(path, 5000 // part, seed)
        sources = [{"name": name, "paths": [str(path)]} for name, path in paths.items()]
        config: dict[str, Any] = {"root": str(root), "corpus": {"sources": sources}, **CONFIG}
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(config))
        subprocess.run([sys.executable, "jobs/mix.py", f"{folder}/config.yaml"], check=True)
        copy_partitions(root)
        copy_removed(root)
        for number, stage in enumerate(CONFIG["mix"]["stages"]):
            copy_stage(root, number, stage["name"], SHARDS // part, TRAINED // part)
        figures = {
            "documents": len(SOURCES) * 5000 // part * COPIES,
            "read_mb": sum(path.stat().st_size for path in root.rglob("*.json*")) / 1e6,
        }
        began = time.monotonic()
        page = subprocess.Popen([sys.executable, "jobs/report.py", f"{folder}/config.yaml"])
        _, status, usage = os.wait4(page.pid, 0)
        figures |= {"seconds": time.monotonic() - began, "memory_gb": usage.ru_maxrss / 1e6}
        if status:
            raise SystemExit(status)
        figures["page_mb"] = (root / "report.html").stat().st_size / 1e6
    common.report(arguments.json, figures)


if __name__ == "__main__":
    main()
