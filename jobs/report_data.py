"""What the report shows, gathered from commits' aggregates, the plan and the ends of stages; only examples are text."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow.compute as pc

from dataprep import storage
from dataprep.quality_report import smallest
from dataprep.storage import Commit, add_up, join, read_json, read_table
from dedup import explain
from jobs import corpus, dedup, mix, tokens
from jobs import quality as quality_job
from mixer.plan import Plan
from mixer.shards import read_end

T = TypeVar("T")
VERSIONS = {
    "corpus": corpus.VERSION, "dedup": dedup.VERSION, "quality": quality_job.VERSION, "tokens": tokens.VERSION,
    "inventory": mix.VERSION, "plan": mix.PLAN_VERSION, "pack": mix.VERSION,
}  # fmt: skip
LARGEST = 10  # clusters shown
HEAD = 600  # characters of a text's beginning
COMPARED = 100_000  # characters of a text in which differences are looked for


@dataclass(frozen=True)
class Outputs:
    """What lies under a root, whoever may be writing there: nothing is built, nothing locked."""

    root: str

    @cached_property
    def newest(self) -> dict[str, str]:
        """Step -> directory of its newest output, as `latest/` says."""
        names = [n.removesuffix(".json") for n in sorted(storage.sizes(join(self.root, "latest"))) if n[0] != "."]
        found = {name: storage.latest(self.root, name) for name in names if name != "vocabulary"}
        return {name: directory for name, directory in found.items() if directory}

    @cached_property
    def steps(self) -> dict[str, str]:
        """Those of them that this version of the code has written, or would write in the same form."""
        current = {name: VERSIONS.get(name.partition("-")[0]) for name in self.newest}
        return {name: d for name, d in self.newest.items() if current[name] in (None, version(d))}

    def commits(self, step: str, take: Callable[[Commit], T]) -> list[T]:
        """`take` of every commit, in the order of their keys. One at a time is in memory, however many there are."""
        directory = self.steps.get(step)
        names = storage.sizes(directory) if directory else {}
        keys = sorted(name.removesuffix(storage.COMMIT) for name in names if name.endswith(storage.COMMIT))

        def load(key: str) -> list[T]:
            commit = Commit.load(directory or "", key)
            return [take(commit)] if commit else []

        with ThreadPoolExecutor(8) as pool:
            return [one for found in pool.map(load, keys) for one in found]

    def aggregates(self, step: str, *names: str) -> list[dict[str, Any]]:
        """These aggregates of every commit."""
        return self.commits(step, lambda c: {name: c.aggregates[name] for name in names})

    @cached_property
    def plan(self) -> Plan | None:
        paths = self.commits("plan", lambda c: c.path("plan"))
        return Plan.from_json(read_json(paths[0]), None) if paths else None

    @cached_property
    def totals(self) -> dict[str, dict[str, Any]]:
        """Of the stages that are packed to their end, held-out first, their totals (mixer/guarantees.py)."""
        stages = (self.plan.held_out, *self.plan.stages) if self.plan else ()
        there = {s.name: self.steps[f"pack-{s.name}"] for s in stages if f"pack-{s.name}" in self.steps}
        ends = {name: read_end(directory) for name, directory in there.items()}
        return {name: end["totals"] for name, end in ends.items() if end}


def version(directory: str) -> int | None:
    """The version of the code that wrote a step's output; None where it does not say."""
    return (read_json(join(directory, "step.json"), version=int) or {}).get("version")


def flow(outputs: Outputs) -> dict[str, dict[str, Any]]:
    """By source, the largest first, and in all ("", before them) what became of its documents and tokens.

    `read`, `bytes`: of what could be read. `quarantined`: records by reason. `verdicts`: documents and bytes by verdict
    ("kept", "exact", "near"). `tokens`: before any is left out. `cells`: (tier, length class or "held out") ->
    [documents, tokens] that may be drawn. Missing where its step has not run.
    """
    by_kind = add_up(outputs.aggregates("corpus", "documents", "bytes", "quarantined"))
    by_kind = {"read": by_kind.pop("documents", {}), "quarantined": {}} | by_kind
    by_kind |= {"verdicts": add_up(outputs.aggregates("dedup", "sources")).get("sources", {})}
    by_kind |= {"tokens": add_up(outputs.aggregates("tokens", "tokens")).get("tokens", {})}
    by_kind |= {"cells": add_up(outputs.commits("inventory", _cells))}
    found = {
        source: {kind: sums[source] for kind, sums in by_kind.items() if source in sums}
        for source in {*by_kind["read"], *by_kind["quarantined"]}
    }
    largest = sorted(found, key=lambda source: (-found[source].get("read", 0), source))
    return ({"": add_up(found.values())} if found else {}) | {source: found[source] for source in largest}


def _cells(commit: Commit) -> dict[str, Any]:
    """The sums of one inventory without its pieces."""
    return add_up(
        {cell["source"]: {(cell["tier"], "held out" if cell["held_out"] else cell["length_class"]):
                          np.array([cell["documents"], cell["tokens"]])}}
        for cell in commit.aggregates["cells"]
    )  # fmt: skip


def clusters(outputs: Outputs) -> dict[str, Any]:
    """Of the clusters of duplicates: `sizes` (documents -> clusters), and of the `largest` a row each, with the kept
    document, the removed one that is least like it, and where their words differ."""
    paths = outputs.commits("dedup-verdicts", lambda c: (c.path("clusters"), c.path("removed")))
    if not paths or not len(table := read_table(paths[0][0])):
        return {}
    sizes = {row["values"]: row["counts"] for row in pc.value_counts(table["documents"]).to_pylist()}
    largest = table.slice(0, LARGEST)  # as they lie
    removed = read_table(paths[0][1], ["doc", "jaccard", "cluster"])
    removed = removed.filter(pc.is_in(removed["cluster"], largest["cluster"].combine_chunks()))
    removed = removed.sort_by([("jaccard", "ascending"), ("doc", "ascending")])
    least = removed.group_by("cluster", False).aggregate([("doc", "first")])
    gone = dict(zip(least["cluster"].to_pylist(), least["doc_first"].to_pylist(), strict=True))
    texts = corpus.documents(outputs.root, {*gone, *gone.values()})
    rows = [row for row in largest.to_pylist() if {row["cluster"], gone[row["cluster"]]} <= texts.keys()]
    pairs = [row | pair(texts[row["cluster"]], texts[gone[row["cluster"]]]) for row in rows]
    return {"sizes": sizes, "largest": pairs}


def pair(kept: dict[str, Any], gone: dict[str, Any]) -> dict[str, Any]:
    """Two documents' beginnings, lengths, and the first places where their words differ."""
    return {
        name: {key: one[key] for key in ("doc", "source", "origin")} | {
            "head": one["text"][:HEAD], "characters": len(one["text"])}
        for name, one in (("kept", kept), ("gone", gone))
    } | {"places": list(explain.differences(kept["text"][:COMPARED], gone["text"][:COMPARED], 6))}  # fmt: skip


def quality(outputs: Outputs) -> dict[str, Any]:
    """`scores` (source -> tier -> counts in equal bins), `failed` rules, contaminated documents by `evaluation` set,
    both by source, and a few `examples` by source and tier."""
    parts = outputs.aggregates("quality", "failed", "scores", "evaluation", "examples")
    examples = smallest(part.pop("examples") for part in parts)
    for part in parts:
        part["scores"] = {s: {t: np.array(n) for t, n in tiers.items()} for s, tiers in part["scores"].items()}
    return add_up(parts) | {"examples": examples} if parts else {}


def windows(outputs: Outputs, stage: str) -> list[dict[str, int]]:
    """Packed tokens by length class of each shard of a stage, in training order."""
    return outputs.commits(
        f"pack-{stage}", lambda c: add_up({cell["length_class"]: cell["tokens"]} for cell in c.aggregates["cells"])
    )


def copies(plan: Plan) -> list[dict[str, Any]]:
    """By tier and length class the tokens there are, those planned over all stages, and of these the first copies."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for stage in plan.stages:
        for cell in stage.cells:
            row = found.setdefault(
                (cell.source, cell.tier, cell.length_class), {"available": cell.available, "planned": 0, "copies": 0.0}
            )
            row["planned"] += cell.planned
            row["copies"] = max(row["copies"], cell.copies_after)
    return [
        {"source": source, "tier": tier, "length_class": c, **row}
        | {"once": round(min(row["planned"], row["available"] * min(1.0, row["copies"])))}
        for (source, tier, c), row in found.items()
    ]


def provenance(outputs: Outputs) -> list[list[Any]]:
    """The newest output of every step: step, version, place, partitions, bytes."""
    rows = []
    for name, directory in outputs.newest.items():
        sizes = storage.sizes(directory)
        partitions = sum(file.endswith(storage.COMMIT) for file in sizes)
        place = directory.removeprefix(outputs.root + "/")
        rows.append([name, version(directory), place, partitions, sum(sizes.values())])
    return rows
