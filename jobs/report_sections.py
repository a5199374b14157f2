"""The report's sections: which figures and tables the page shows, and what it says about them."""

import platform
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml

from jobs import dedup_report, plan_report, report_curves, report_data, report_figures
from jobs.config import Config
from jobs.report_data import Outputs
from jobs.report_figures import Figure
from jobs.tables import Table
from mixer.config import TIERS
from mixer.plan import Plan
from mixer.shards import StageInfo

PACKAGES = ("trivium", "numpy", "pyarrow", "numba", "tokenizers", "ray", "torch", "plotly")
USER = re.compile(r"(://)[^/@\s]+@")  # a URL's user and password


@dataclass(frozen=True)
class Section:
    """A part of the page; tables without a row are left out. clusters: `largest` of `report_data.clusters`."""

    name: str
    title: str
    intro: str
    figures: list[Figure]
    tables: list[Table]
    clusters: list[dict[str, Any]] | tuple = ()
    examples: dict[str, list[dict[str, Any]]] | tuple = ()
    blocks: list[tuple[str, str]] | tuple = ()


def tiles(sources: dict[str, dict[str, Any]], plan: Plan | None, stages: list[dict[str, Any]]) -> dict[str, str]:
    """The figures at the top: what -> how much."""
    every = sources.get("", {})
    last: dict[str, Any] = next((s["evaluation"]["held_out"] for s in reversed(stages) if s["evaluation"]), {})
    found = {
        "records read": (every.get("read", 0) + sum(every.get("quarantined", {}).values()), ",d"),
        "documents kept": (every.get("verdicts", {}).get("kept", {}).get("documents"), ",d"),
        "tokens": (every.get("tokens"), ",d"),
        "tokens planned": (sum(s.tokens for s in plan.stages) if plan else None, ",d"),
        "held-out loss, nats per token": (last.get("loss"), ".3f"),
        "bits per byte": (last.get("bits_per_byte"), ".3f"),
    }
    return {name: format(value, kind) for name, (value, kind) in found.items() if value}


def flow(sources: dict[str, dict[str, Any]], plan: Plan | None) -> Section | None:
    if not sources:
        return None
    rows = []
    for name, s in sources.items():
        bad, read = sum(s.get("quarantined", {}).values()), s.get("read", 0)
        verdicts = [s.get("verdicts", {}).get(reason, {}).get("documents") for reason in ("exact", "near", "kept")]
        cells = [c for stage in plan.stages for c in stage.cells if name in ("", c.source)] if plan else []
        planned = sum(c.planned for c in cells) if plan else None
        rows.append([name or "all", bad + read, bad, *verdicts, s.get("bytes"), s.get("tokens"), planned])
    columns = "source, records:count, quarantined:count, exact:count, near:count, kept:count, MB:MB, tokens:count"
    reasons = [[n, reason, k] for n, s in sources.items() if n for reason, k in s.get("quarantined", {}).items()]
    tables = [
        Table("By source", f"{columns}, tokens planned:count", rows),
        Table("Quarantined", "source, reason, records:count", reasons),
    ]
    intro = "Where every record went, and how many tokens it became."
    return Section("flow", "Where the documents went", intro, report_figures.flows(sources, plan), tables)


def deduplication(sources: dict[str, dict[str, Any]], clusters: dict[str, Any]) -> Section | None:
    verdicts = {name: s["verdicts"] for name, s in sources.items() if name and "verdicts" in s}
    if not verdicts:
        return None
    figures = [report_figures.losses(verdicts)]
    figures += [report_figures.cluster_sizes(clusters["sizes"])] if clusters else []
    intro = "A document is removed only where its text was compared with one that is kept."
    largest = clusters.get("largest", ())
    return Section("dedup", "Deduplication", intro, figures, [dedup_report.losses(verdicts)], clusters=largest)


def quality(found: dict[str, Any]) -> Section | None:
    if not found:
        return None
    hits = [[s, name, n] for s, sets in found["evaluation"].items() for name, n in sets.items()]
    tables = [Table("Contaminated", "source, evaluation set, documents:count", hits)]
    examples: dict[str, list[dict[str, Any]]] = {}
    for tier in reversed(TIERS):
        few = [e | {"source": s} for s, tiers in found["examples"].items() for e in tiers.get(tier, [])]
        examples[tier] = sorted(few, key=lambda e: e["rank"])[:6]
    intro = "Every document has a score and a tier; good ones are repeated, poor ones less often drawn."
    return Section("quality", "Quality", intro, report_figures.quality(found), tables, examples=examples)


def curriculum(outputs: Outputs, plan: Plan | None) -> Section | None:
    if plan is None:
        return None
    totals, shares = outputs.totals, plan_report.shares(plan, outputs.totals)
    figures = [report_curves.shares(shares[0].rows), report_curves.repeated(plan)]
    figures += report_curves.course({s.name: report_data.windows(outputs, s.name) for s in plan.stages})
    tables = [plan_report.packed(plan, totals), *shares, *plan_report.limits(plan, totals)]
    intro = "What each stage was asked to hold, what the plan gives it, and what was packed."
    return Section("curriculum", "The curriculum", intro, figures, tables)


def training(stages: list[dict[str, Any]]) -> Section | None:
    if not stages:
        return None
    scores = []
    for s in stages:
        if e := s["evaluation"]:
            for of, by in (("all", {"": e["held_out"]}), ("source", e["sources"]), ("class", e["classes"])):
                scores += [[s["stage"], of, n, x["tokens"], x["loss"], x["bits_per_byte"]] for n, x in by.items()]
    columns = "stage, of, name, tokens:count, nats per token:number, bits per byte:number"
    intro = "All stages on one axis of tokens; dotted lines: where a stage begins. Of a long curve, every k-th step."
    tables = [Table("Held-out documents", columns, scores)]
    return Section("training", "Training", intro, report_curves.training(stages), tables)


def provenance(outputs: Outputs, config: Config, plan: Plan | None, command: str) -> Section:
    old = ", ".join(step for step in outputs.newest if step not in outputs.steps)
    intro = "What made these outputs."
    intro += f" Of another version, and left out above until they are made anew: {old}." if old else ""
    facts = [["seed", str(plan.seed)]] if plan else []
    if plan and (directory := outputs.steps.get(f"pack-{plan.stages[0].name}")):
        info = StageInfo.load(directory)
        facts += [["plan and token ids", info.plan], ["tokeniser", info.tokenizer]]
    versions = [["Python", platform.python_version()], *([name, version] for name in PACKAGES if (version := of(name)))]
    tables = [
        Table("Steps", "step, version:number, directory, partitions:count, MB:MB", report_data.provenance(outputs),
              "A directory's name ends with the fingerprint of its step, version and options."),
        Table("Fingerprints", "of, is", facts),
        Table("Versions, here and now", "of, is", versions),
    ]  # fmt: skip
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    more = {"pipeline": "", "dedup": "--explain DOC", "mix": "--explain SOURCE/TIER/CLASS", "report": "--serve"}
    commands = "\n".join(f"python jobs/{job}.py {command} {flag}".rstrip() for job, flag in more.items())
    blocks = [("Commands", USER.sub(r"\1...@", commands)), ("Configuration", USER.sub(r"\1...@", settings))]
    return Section("provenance", "Provenance", intro, [], tables, blocks=blocks)


def of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
