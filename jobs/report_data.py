"""What the report shows, gathered from commits' aggregates, the plan and the ends of stages; only examples are text."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from dataprep import storage
from dataprep.quality_report import EXAMPLES
from dataprep.storage import Commit, join, read_table
from dedup import explain
from dedup.report import REASONS
from jobs import corpus, dedup, mix, tokens
from jobs import quality as quality_job
from mixer.plan import Plan
from mixer.shards import read_end

T = TypeVar("T")
Counts = dict[str, Any]
VERSIONS = {
    "corpus": corpus.VERSION, "dedup": dedup.VERSION, "quality": quality_job.VERSION, "tokens": tokens.VERSION,
    "inventory": mix.VERSION, "plan": mix.PLAN_VERSION, "pack": mix.VERSION,
}  # fmt: skip
PAIRS = 6  # clusters whose texts are shown
LARGEST = 10  # clusters listed
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
        return Plan.from_json(storage.read_json(paths[0]), None) if paths else None

    def state(self) -> str:
        """A fingerprint that changes when a commit, a metric or an evaluation appears."""
        steps = Outputs(self.root).newest
        train = steps.pop("train", "")
        stages = [join(train, name.removeprefix("pack-")) for name in steps if train and name.startswith("pack-")]
        return storage.fingerprint([[d, storage.sizes(d)] for d in [*steps.values(), *stages]])


def version(directory: str) -> int | None:
    """The version of the code that wrote a step's output; None where it does not say."""
    return (storage.read_json(join(directory, "step.json"), version=int) or {}).get("version")


def add(parts: Iterable[dict[Any, Any]], total: dict[Any, Any] | None = None) -> dict[Any, Any]:
    """Nested mappings of counts and lists of counts, added up (in `total`, where one is given)."""
    total = {} if total is None else total
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                add([value], total.setdefault(key, {}))
            elif isinstance(value, list):
                total[key] = [a + b for a, b in zip(total.get(key, [0] * len(value)), value, strict=True)]
            else:
                total[key] = total.get(key, 0) + value
    return total


def flow(outputs: Outputs) -> dict[str, Counts]:
    """By source what became of its documents and tokens.

    `documents`: read, quarantined, exact, near, kept. `bytes`: read. `tokens`: all there are. `cells`: (tier, length
    class or "held out") -> [documents, tokens] that may be drawn. Over all sources, under "": also `removed`.
    """
    read = add(outputs.aggregates("corpus", "documents", "bytes", "quarantined"))
    verdicts = add(outputs.aggregates("dedup", "sources")).get("sources", {})
    tokens = add(outputs.aggregates("tokens", "tokens")).get("tokens", {})
    drawable = add(outputs.commits("inventory", _inventory)) or {"cells": {}, "removed": {}}
    found = {}
    for source in {*read.get("documents", {}), *read.get("quarantined", {})}:
        reasons, bad = verdicts.get(source, {}), read["quarantined"].get(source, {})
        counts = {reason: reasons.get(reason, {}).get("documents", 0) for reason in REASONS if reasons}
        found[source] = {
            "documents": {"read": read["documents"].get(source, 0), "quarantined": sum(bad.values()), **counts},
            "quarantined": bad,
            "bytes": {"read": read["bytes"].get(source, 0), **{r: c["bytes"] for r, c in reasons.items()}},
            "tokens": tokens.get(source, 0),
            "cells": drawable["cells"].get(source, {}),
        }
    largest = sorted(found, key=lambda source: (-found[source]["documents"]["read"], source))
    total = {"": add(found.values()) | {"removed": drawable["removed"]}} if found else {}
    return total | {source: found[source] for source in largest}


def _inventory(commit: Commit) -> dict[str, Any]:
    """The sums of one inventory without its pieces."""
    cells = [
        {cell["source"]: {(cell["tier"], "held out" if cell["held_out"] else cell["length_class"]):
                          [cell["documents"], cell["tokens"]]}}
        for cell in commit.aggregates["cells"]
    ]  # fmt: skip
    return {"cells": add(cells), "removed": commit.aggregates["removed"]}


def clusters(outputs: Outputs) -> dict[str, Any]:
    """Of the clusters of duplicates: `sizes` (documents -> clusters), the `largest`, and `pairs` to look at: of those
    with most near duplicates the kept document and the one least like it."""
    paths = outputs.commits("dedup-verdicts", lambda c: (c.path("clusters"), c.path("removed")))
    if not paths or not len(table := read_table(paths[0][0])):
        return {}
    sizes = {row["values"]: row["counts"] for row in pc.value_counts(table["documents"]).to_pylist()}
    largest = table.slice(0, LARGEST).to_pylist()  # as they lie
    nearest = table.sort_by([("near", "descending"), ("cluster", "ascending")]).slice(0, PAIRS)
    removed = read_table(paths[0][1], ["doc", "reason", "jaccard", "cluster"])
    removed = removed.filter(pc.is_in(removed["cluster"], nearest["cluster"].combine_chunks()))
    removed = removed.set_column(1, "reason", removed["reason"].cast(pa.string()))
    removed = removed.sort_by([("jaccard", "ascending"), ("doc", "ascending")])
    first = [(name, "first") for name in ("doc", "reason", "jaccard")]
    least = {row["cluster"]: row for row in removed.group_by("cluster", False).aggregate(first).to_pylist()}
    docs = {*least, *(row["doc_first"] for row in least.values()), *(row["cluster"] for row in largest)}
    texts = corpus.documents(outputs.root, docs)
    pairs = []
    for cluster in nearest.to_pylist():
        row = least[cluster["cluster"]]
        if {row["cluster"], row["doc_first"]} <= texts.keys():
            about = {"documents": cluster["documents"], "reason": row["reason_first"], "jaccard": row["jaccard_first"]}
            pairs.append(about | pair(texts[row["cluster"]], texts[row["doc_first"]]))
    return {
        "sizes": dict(sorted(sizes.items())),
        "largest": [row | {"origin": texts.get(row["cluster"], {}).get("origin", "")} for row in largest],
        "pairs": sorted(pairs, key=lambda p: -p["documents"]),
    }


def pair(kept: dict[str, Any], gone: dict[str, Any]) -> dict[str, Any]:
    """Two documents' beginnings, lengths, and the first places where their words differ."""
    one, other = kept["text"][:COMPARED], gone["text"][:COMPARED]
    return {
        "kept": {name: kept[name] for name in ("doc", "source", "origin")} | {"head": one[:HEAD]},
        "gone": {name: gone[name] for name in ("doc", "source", "origin")} | {"head": other[:HEAD]},
        "characters": [len(kept["text"]), len(gone["text"])],
        "places": list(explain.differences(one, other, 6)),
    }


def quality(outputs: Outputs) -> dict[str, Any]:
    """`scores`, `tiers` and `failed` by source, documents by `languages`, contaminated ones by `evaluation` set, and a
    few `examples` by tier: those with the smallest hash of each source."""
    parts = outputs.aggregates("quality", "cells", "failed", "scores", "evaluation", "examples")
    if not parts:
        return {}
    cells = [cell for part in parts for cell in part.pop("cells")]
    languages = add({cell["language"]: cell["documents"]} for cell in cells)
    tiers = add({cell["source"]: {cell["tier"]: cell["documents"]}} for cell in cells)
    best: dict[str, dict[str, list]] = {}
    for part in parts:
        for source, by_tier in part.pop("examples").items():
            for tier, few in by_tier.items():
                mine = best.setdefault(source, {}).setdefault(tier, [])
                mine[:] = sorted([*mine, *few], key=lambda one: (one["rank"], one["doc"]))[:EXAMPLES]
    spoken = dict(sorted(languages.items(), key=lambda item: -item[1]))
    return add(parts) | {"tiers": tiers, "languages": spoken, "examples": best}


def windows(outputs: Outputs, stage: str) -> list[dict[str, int]]:
    """Packed tokens by length class of each shard of a stage, in training order."""

    def take(commit: Commit) -> dict[str, int]:
        return add({cell["length_class"]: cell["tokens"]} for cell in commit.aggregates["cells"])

    return outputs.commits(f"pack-{stage}", take)


def end(outputs: Outputs, stage: str) -> dict[str, Any]:
    """The stage's totals (mixer/guarantees.py); {} where it is not packed to its end."""
    directory = outputs.steps.get(f"pack-{stage}")
    return (read_end(directory) or {"totals": {}})["totals"] if directory else {}


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
