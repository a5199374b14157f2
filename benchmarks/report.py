"""The report page of ten million documents: time, memory and size, from made-up commits. `python -m benchmarks.report`.

2,000 partitions of 5,000 documents, 20 sources: commits of every step as the jobs write them (inventories with their
buckets and items), a plan by the planner itself, 1.2 million removed documents, two stages of 400 shards and 100,000
steps each. Twelve partitions have their texts: the largest clusters lie in them.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from benchmarks.dedup_corpus import about, save
from dataprep import manifest
from dataprep.quality_report import BINS
from dataprep.rules import RULES
from dataprep.storage import Attempt, write_json
from dedup import keepers
from jobs.config import Config
from jobs.report_data import VERSIONS
from mixer.config import CLASSES, TIERS
from mixer.inventory import BUCKETS, add_inventories
from mixer.planner import make_plan
from mixer.shards import StageInfo, write_end

DOCUMENTS = 5_000  # of a partition
SOURCES = [f"source-{k:02d}" for k in range(20)]
LANGUAGES = [f"{a}{b}" for a in "aeiou" for b in "bdfgkn"]
WITH_TEXT = 12
STAGES = [("base", 8192), ("longer", 131_072)]


def publish(root: Path, step: str) -> str:
    """A step's directory, pointed to as the engine does."""
    write_json(str(root / "latest" / f"{step}.json"), {"directory": f"{step}-0123456789ab"})
    write_json(
        str(root / f"{step}-0123456789ab" / "step.json"), {"name": step, "version": VERSIONS[step.partition("-")[0]]}
    )
    return str(root / f"{step}-0123456789ab")


def inventory(rng: np.random.Generator, source: str) -> dict[str, Any]:
    """The aggregates of one partition's inventory, all its items listed."""
    cells = []
    for tier in TIERS:
        for c, share, tokens in zip(CLASSES, (0.8, 0.17, 0.03), (600, 8000, 60_000), strict=True):
            n = int(DOCUMENTS * share / 3)
            place, length = np.sort(rng.integers(0, 1 << 32, n)), rng.integers(tokens // 2, tokens * 2, n)
            buckets = np.bincount(place >> 22, length, BUCKETS).astype(np.int64)
            cells.append(
                {"source": source, "tier": tier, "length_class": c, "held_out": False, "documents": n,
                 "tokens": int(length.sum()), "usable": [int(length.sum())] * len(STAGES),
                 "buckets": buckets.tolist(), "items": [place.tolist(), length.tolist()]}
            )  # fmt: skip
    removed = {
        name: {"documents": 600, "tokens": 900_000} if name == "duplicate" else {"documents": 0, "tokens": 0}
        for name in ("duplicate", "excluded", "contaminated", "excluded_duplicate")
    }
    total = {"documents": DOCUMENTS, "tokens": sum(c["tokens"] for c in cells) + 900_000}
    return {**total, "exclude_lines": [], "cells": cells, "removed": removed}


def quality(rng: np.random.Generator, source: str) -> dict[str, Any]:
    share = DOCUMENTS // len(LANGUAGES) // 3
    cells = [
        {"source": source, "language": language, "tier": t, "documents": share, "bytes": 4000 * share}
        for language in LANGUAGES for t in TIERS
    ]  # fmt: skip
    examples = [{"doc": k, "rank": int(rng.integers(1 << 62)), "score": 0.5, "excerpt": "word " * 40} for k in range(3)]
    return {
        "cells": cells,
        "failed": {source: {rule: int(rng.integers(500)) for rule in RULES}},
        "scores": {source: {t: rng.integers(0, 300, BINS).tolist() for t in TIERS}},
        "evaluation": {source: {"quiz": 3}},
        "examples": {source: dict.fromkeys(TIERS, examples)},
    }


def documents(rng: np.random.Generator, first: int) -> pa.Table:
    words = np.array([f"word{k}" for k in range(5000)])
    texts = [" ".join(words[rng.integers(0, 5000, 600)]) for _ in range(DOCUMENTS)]
    docs = np.arange(first, first + DOCUMENTS, dtype=np.uint64)
    names = pa.array([f"page {k}" for k in docs])
    return pa.table(
        {"doc": docs, "source": names, "id": names, "origin": names, "text": pa.array(texts, pa.large_string())}
    )


def partitions(root: Path, number: int) -> list[dict[str, Any]]:
    """The commits of every step that maps over partitions; the inventories' aggregates, slim, for the planner."""
    rng, slim = np.random.default_rng(0), []
    directories = {n: publish(root, n) for n in ("corpus", "dedup", "quality", "tokens", "inventory")}
    manifest.save(
        str(root / "manifest.jsonl"),
        [manifest.Entry(k, k, SOURCES[k % len(SOURCES)], "", "", 0) for k in range(number)],
    )
    for k in range(number):
        source, first = SOURCES[k % len(SOURCES)], k << 40
        counts = {"kept": DOCUMENTS - 600, "near": 400, "exact": 200}
        found = inventory(rng, source)
        aggregates = {
            "corpus": {"documents": {source: DOCUMENTS}, "bytes": {source: 4000 * DOCUMENTS},
                       "quarantined": {source: {"malformed JSON": 2}}},
            "dedup": {"sources": {source: {r: {"documents": n, "bytes": 4000 * n} for r, n in counts.items()}}},
            "quality": quality(rng, source),
            "tokens": {name: {source: n} for name, n in
                       (("documents", DOCUMENTS), ("bytes", 4000 * DOCUMENTS), ("tokens", found["tokens"]))},
            "inventory": found,
        }  # fmt: skip
        for step, sums in aggregates.items():
            out = Attempt(
                directories[step], f"{k:05d}" + ("" if step == "corpus" else "-00000"), {"documents": "0" * 32}
            )
            if step == "corpus" and k < WITH_TEXT:
                out.table("documents-00000", documents(rng, first), row_group_size=1000)
            out.commit(sums)
        cells = [c | {"items": None} for c in found["cells"]]
        slim = [add_inventories([*slim, found | {"cells": cells}]) | {"exclude_lines": []}]
    return slim


def clusters(root: Path, number: int) -> None:
    rng = np.random.default_rng(1)
    keepers_of = np.concatenate(
        [np.repeat([(k % WITH_TEXT << 40) + k for k in range(20)], 2000), (rng.integers(0, number, number * 580) << 40)]
    )
    docs = (np.arange(len(keepers_of)) % number << 40) + 1000 + np.arange(len(keepers_of)) // number
    reason = pa.DictionaryArray.from_arrays(
        pa.array(np.arange(len(docs), dtype=np.int32) % 2), pa.array(keepers.REASONS)
    )
    kept = pa.array(keepers_of.astype(np.uint64))
    jaccard = pa.array(rng.uniform(0.8, 1, len(docs)).astype(np.float32))
    removed = pa.table([docs.astype(np.uint64), reason, kept, jaccard, kept], schema=keepers.REMOVED).sort_by("doc")
    out = Attempt(publish(root, "dedup-verdicts"), "all", {})
    out.table("removed", removed)
    out.table("clusters", keepers.clusters(removed))
    out.commit({"removed": len(removed), "clusters": 0})


def curriculum(root: Path, config: Config, sums: dict[str, Any], shards: int, steps: int) -> None:
    """The plan, the packed stages and what a trainer leaves behind."""
    plan, rng = make_plan(sums, config.mix), np.random.default_rng(2)
    out = Attempt(publish(root, "plan"), "all", {})
    with out.file("plan", ".json") as path, open(path, "w") as file:
        json.dump(plan.to_json(), file)
    out.commit({})
    for number, stage in enumerate(plan.stages):
        directory = publish(root, f"pack-{stage.name}")
        info = StageInfo(
            stage.name, number, stage.context, 1e4, stage.tokens, 1 << 16, 0, "uint16", plan.sources, TIERS, CLASSES,
            "t", "p", shards,
        )  # fmt: skip
        info.save(directory)
        each = [{"source": c.source, "tier": c.tier, "length_class": c.length_class, "tokens": c.planned // shards}
                for c in stage.cells]  # fmt: skip
        for k in range(shards):
            Attempt(directory, f"{k:05d}", {}).commit({"sequences": 1000, "cells": each})
        shares = {c: [n / stage.tokens] * 2 for c, n in stage.classes.items()}
        totals = {
            "packed": stage.tokens,
            "sequences": 1000 * shards,
            "padding_share": 0.001,
            "truncated": 0,
            "dropped": 0,
        }
        totals |= {"cut": 0, "segments_per_sequence": 9.0, "sum_of_squares": {"p50": 1e6, "p99": 2e6, "max": 3e6}}
        totals |= {
            "most_copies": {t: [1, 2] for t in TIERS},
            "shares": {"length_class": shares, "source": {}, "tier": {}},
        }
        write_end(directory, [1000] * shards, totals)
        folder = root / "train-0123456789ab" / stage.name
        folder.mkdir(parents=True)
        with open(folder / "metrics.jsonl", "w") as file:
            for k in range(steps):
                step, loss = number * steps + k + 1, 2 + rng.random()
                groups = {"sources": dict.fromkeys(SOURCES, loss), "classes": dict.fromkeys(CLASSES, loss)}
                record = {"step": step, "tokens": step * 4_000_000, "sequences": 512, "loss": loss, "gradient": 0.3,
                          "lr": 1e-4, "tokens_per_second": 1e6, "mfu": 0.4,
                          "expert_load": [[1.0] * 8] * 4, **groups}  # fmt: skip
                file.write(json.dumps(record) + "\n")
    write_json(str(root / "latest" / "train.json"), {"directory": "train-0123456789ab"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--json", help="write the figures there, as one flat object")
    arguments = parser.parse_args()
    part = 10 if arguments.quick else 1
    duration = "half a minute" if arguments.quick else "four minutes"
    print(f"about {duration}, most of it to make the commits; {about('plotly')}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        values = {
            "root": str(root),
            "corpus": {"sources": [{"name": s, "paths": ["none"]} for s in SOURCES]},
            "mix": {"stages": [{"name": n, "context": c, "tokens": 10_000_000_000 // part} for n, c in STAGES]},
        }
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(values))
        (sums,) = partitions(root, 2000 // part)
        clusters(root, 2000 // part)
        curriculum(root, Config(**values), sums, 400 // part, 100_000 // part)
        read = sum(f.stat().st_size for f in root.rglob("*.json*")) / 1e6
        began = time.monotonic()
        subprocess.run([sys.executable, "jobs/report.py", f"{folder}/config.yaml"], check=True)
        seconds = time.monotonic() - began
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        size = (root / "report.html").stat().st_size / 1e6
    figures = {
        "documents": 2000 // part * DOCUMENTS,
        "read_mb": read,
        "seconds": seconds,
        "memory_gb": memory,
        "page_mb": size,
    }
    for name, value in figures.items():
        print(f"{name:12}{value:14,.2f}")
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
