"""What the report shows, gathered from commits' aggregates, the plan and the ends of stages; only examples are text."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from dataprep import storage
from dataprep.quality_report import EXAMPLES
from dataprep.storage import Commit, join, read_groups
from dedup import explain, report
from jobs import corpus, dedup, mix, tokens
from jobs import quality as quality_job
from mixer.plan import Plan

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
        found = {}
        for file in sorted(storage.sizes(join(self.root, "latest"))):
            entry = storage.read_json(join(self.root, "latest", file))
            if isinstance(entry, dict) and "directory" in entry:
                found[file.removesuffix(".json")] = join(self.root, entry["directory"])
        return found

    @cached_property
    def steps(self) -> dict[str, str]:
        """Those of them that this version of the code has written, or would write in the same form."""
        current = {}
        for name, directory in self.newest.items():
            version = VERSIONS.get(name.partition("-")[0])
            if version is None or version == (storage.read_json(join(directory, "step.json")) or {}).get("version"):
                current[name] = directory
        return current

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


def add(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Nested mappings of counts, added up."""
    total: dict[str, Any] = {}
    for part in parts:
        _add(total, part)
    return total


def _add(total: dict[Any, Any], part: dict[Any, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        elif isinstance(value, list):
            total[key] = [a + b for a, b in zip(total.get(key, [0] * len(value)), value, strict=True)]
        else:
            total[key] = total.get(key, 0) + value


def flow(outputs: Outputs) -> dict[str, Counts]:
    """By source what became of its documents and tokens.

    `documents`: read, quarantined, exact, near, kept. `bytes`: read. `tokens`: all there are. `cells`: (tier, length
    class or "held out") -> [documents, tokens] that may be drawn. Over all sources, under "": also `removed`.
    """
    corpus = add(outputs.aggregates("corpus", "documents", "bytes", "quarantined"))
    verdicts = report.total(part["sources"] for part in outputs.aggregates("dedup", "sources"))
    tokens = add(outputs.aggregates("tokens", "tokens")).get("tokens", {})
    drawable: dict[str, dict[tuple[str, str], list[int]]] = {}
    removed: Counts = {}
    for part in outputs.commits("inventory", _inventory):
        for source, cells in part["cells"].items():
            _add(drawable.setdefault(source, {}), cells)
        _add(removed, part["removed"])
    found = {}
    for source in sorted({*corpus.get("documents", {}), *corpus.get("quarantined", {})}):
        reasons = verdicts.get(source, {})
        documents = (
            {reason: reasons.get(reason, {}).get("documents", 0) for reason in report.REASONS} if reasons else {}
        )
        found[source] = {
            "documents": {
                "read": corpus["documents"].get(source, 0),
                "quarantined": sum(corpus["quarantined"].get(source, {}).values()),
                **documents,
            },
            "quarantined": corpus["quarantined"].get(source, {}),
            "bytes": {"read": corpus["bytes"].get(source, 0), **{r: c["bytes"] for r, c in reasons.items()}},
            "tokens": tokens.get(source, 0),
            "cells": drawable.get(source, {}),
        }
    largest = sorted(found, key=lambda source: (-found[source]["documents"]["read"], source))
    total = {"": add(list(found.values())) | {"removed": removed}} if found else {}
    return total | {source: found[source] for source in largest}


def _inventory(commit: Commit) -> dict[str, Any]:
    """The sums of one inventory without its buckets and items."""
    cells: dict[str, dict[tuple[str, str], list[int]]] = {}
    for cell in commit.aggregates["cells"]:
        key = (cell["tier"], "held out" if cell["held_out"] else cell["length_class"])
        _add(cells.setdefault(cell["source"], {}), {key: [cell["documents"], cell["tokens"]]})
    return {"cells": cells, "removed": commit.aggregates["removed"]}


def clusters(outputs: Outputs) -> dict[str, Any]:
    """Of the clusters of duplicates: `sizes` (documents -> clusters), the `largest`, and `pairs` to look at."""
    paths = outputs.commits("dedup-verdicts", lambda c: (c.path("clusters"), c.path("removed")))
    if not paths:
        return {}
    sizes: Counter = Counter()
    largest = pa.table({})
    for table in read_groups(paths[0][0], ["cluster", "documents", "exact", "near", "least_jaccard"]):
        for row in pc.value_counts(table["documents"].combine_chunks()).to_pylist():
            sizes[row["values"]] += row["counts"]
        largest = pa.concat_tables([largest, table]) if len(largest) else table
        largest = largest.sort_by([("near", "descending"), ("cluster", "ascending")]).slice(0, PAIRS)
    if not sizes:
        return {}
    first = next(read_groups(paths[0][0], largest.column_names)).slice(0, LARGEST)  # as they lie: largest first
    chosen = {row["cluster"]: row for row in largest.to_pylist()}
    least: dict[int, dict[str, Any]] = {}
    for table in read_groups(paths[0][1], ["doc", "reason", "jaccard", "cluster"]):
        mine = table.filter(pc.is_in(table["cluster"], pa.array(chosen, pa.uint64())))
        for row in mine.to_pylist():
            if row["cluster"] not in least or row["jaccard"] < least[row["cluster"]]["jaccard"]:
                least[row["cluster"]] = row
    texts = _texts(outputs, {*least, *(row["doc"] for row in least.values())} | set(first["cluster"].to_pylist()))
    pairs = [
        _pair(texts[cluster], texts[row["doc"]], row, chosen[cluster]["documents"])
        for cluster, row in least.items()
        if cluster in texts and row["doc"] in texts
    ]
    rows = [row | {"origin": texts.get(row["cluster"], {}).get("origin", "")} for row in first.to_pylist()]
    return {
        "sizes": dict(sorted(sizes.items())),
        "largest": rows,
        "pairs": sorted(pairs, key=lambda p: -p["documents"]),
    }


def _texts(outputs: Outputs, docs: set[int]) -> dict[int, dict[str, Any]]:
    """The documents of these numbers, where they can still be read."""
    paths = {
        f"{key}-{name.removeprefix('documents-')}": path
        for key, files in outputs.commits("corpus", lambda c: (c.key, {name: c.path(name) for name in c.files}))
        for name, path in files.items()
        if name.startswith("documents-")
    }
    starts = dict(outputs.commits("dedup-signatures", lambda c: (c.key, c.aggregates["first_doc"])))
    keys = sorted(paths.keys() & starts.keys(), key=starts.__getitem__)
    return explain.documents([paths[key] for key in keys], [starts[key] for key in keys], docs) if keys else {}


def _pair(kept: dict[str, Any], gone: dict[str, Any], row: dict[str, Any], documents: int) -> dict[str, Any]:
    one, other = kept["text"][:COMPARED], gone["text"][:COMPARED]
    return {
        "documents": documents,
        "reason": row["reason"],
        "jaccard": row["jaccard"],
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
    languages: Counter = Counter()
    tiers: dict[str, Counter] = {}
    best: dict[str, dict[str, list]] = {}
    for part in parts:
        for cell in part.pop("cells"):
            languages[cell["language"]] += cell["documents"]
            tiers.setdefault(cell["source"], Counter())[cell["tier"]] += cell["documents"]
        for source, by_tier in part.pop("examples").items():
            for tier, few in by_tier.items():
                mine = best.setdefault(source, {}).setdefault(tier, [])
                mine[:] = sorted([*mine, *few], key=lambda one: (one["rank"], one["doc"]))[:EXAMPLES]
    return add(parts) | {"tiers": tiers, "languages": dict(languages.most_common()), "examples": best}


def windows(outputs: Outputs, stage: str) -> list[dict[str, int]]:
    """Packed tokens by length class of each shard of a stage, in training order."""

    def take(commit: Commit) -> dict[str, int]:
        return add([{cell["length_class"]: cell["tokens"]} for cell in commit.aggregates["cells"]])

    return outputs.commits(f"pack-{stage}", take)


def end(outputs: Outputs, stage: str) -> dict[str, Any]:
    """The stage's totals (mixer/guarantees.py) with its `context`; {} where it is not packed to its end."""
    directory = outputs.steps.get(f"pack-{stage}")
    found = storage.read_json(join(directory, "end.json")) if directory else None
    info = storage.read_json(join(directory, "stage.json")) if directory else None
    return found["totals"] | {"context": info["context"]} if found and info and found.get("totals") else {}


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


def provenance(outputs: Outputs) -> list[dict[str, Any]]:
    """The newest output of every step: its version, place, partitions and bytes."""
    rows = []
    for name, directory in sorted(outputs.newest.items()):
        about = storage.read_json(join(directory, "step.json")) or {}
        sizes = storage.sizes(directory)
        row = {
            "step": name,
            "version": about.get("version"),
            "current": name in outputs.steps,
            "place": directory.removeprefix(outputs.root + "/"),
        }
        row["partitions"] = sum(file.endswith(storage.COMMIT) for file in sizes)
        rows.append(row | {"bytes": sum(sizes.values())})
    return rows


def stage_info(outputs: Outputs, step: str) -> dict[str, Any]:
    """The stage.json of a packed stage; {} where it is gone."""
    return storage.read_json(join(outputs.steps[step], "stage.json")) or {}
