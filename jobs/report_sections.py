"""The report's sections: which figures and tables the page shows, and what it says about them."""

import platform
import re
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import yaml

from jobs import report_curves, report_data, report_figures
from jobs.config import Config
from jobs.report_data import Counts, Outputs
from jobs.report_figures import Figure
from mixer.config import CLASSES, TIERS
from mixer.plan import Plan
from mixer.shards import StageInfo

PACKAGES = ("trivium", "numpy", "pyarrow", "numba", "tokenizers", "ray", "torch", "plotly")
USER = re.compile(r"(://)[^/@\s]+@")  # a URL's user and password


@dataclass(frozen=True)
class Table:
    """columns: `name:kind, ...`, a kind of FORMATS or none for text; rows: a value per column, None: an empty cell."""

    title: str
    columns: str
    rows: list[list[Any]]
    note: str = ""

    @property
    def heads(self) -> list[tuple[str, str]]:
        return [(name, kind or "text") for name, _, kind in (c.partition(":") for c in self.columns.split(", "))]


@dataclass(frozen=True)
class Section:
    """A part of the page; tables without a row are left out. pairs: as from `report_data.clusters`."""

    name: str
    title: str
    intro: str
    figures: list[Figure]
    tables: list[Table]
    pairs: list[dict[str, Any]] | tuple = ()
    examples: dict[str, list[dict[str, Any]]] | tuple = ()
    blocks: list[tuple[str, str]] | tuple = ()


def tiles(sources: dict[str, Counts], plan: Plan | None, stages: list[dict[str, Any]]) -> dict[str, str]:
    """The figures at the top: what -> how much."""
    every = sources.get("", {"documents": {"read": 0, "quarantined": 0}, "tokens": 0})
    scores = [s["evaluation"]["held_out"] for s in stages if s["evaluation"]]
    last = scores[-1] if scores else {}
    found = {
        "records read": (every["documents"]["read"] + every["documents"]["quarantined"], ",d"),
        "documents kept": (every["documents"].get("kept"), ",d"),
        "tokens": (every["tokens"], ",d"),
        "tokens planned": (sum(s.tokens for s in plan.stages) if plan else None, ",d"),
        "held-out loss, nats per token": (last.get("loss"), ".3f"),
        "bits per byte": (last.get("bits_per_byte"), ".3f"),
    }
    return {name: format(value, kind) for name, (value, kind) in found.items() if value}


def flow(sources: dict[str, Counts], plan: Plan | None) -> Section | None:
    if not sources:
        return None
    rows = []
    for name, s in sources.items():
        count, cells = s["documents"], s["cells"]
        left = drawable = held_out = planned = None
        if cells:
            held_out = sum(documents for (_, c), (documents, _) in cells.items() if c == "held out")
            drawable = sum(documents for documents, _ in cells.values()) - held_out
            left = count["kept"] - drawable - held_out if "kept" in count else None
        if plan:
            planned = sum(c.planned for stage in plan.stages for c in stage.cells if name in ("", c.source))
        lost = [count["quarantined"], count.get("exact"), count.get("near"), left]
        rows.append([name or "all", count["read"] + count["quarantined"], *lost, drawable, held_out, s["bytes"]["read"],
                     s["tokens"] or None, planned])  # fmt: skip
    columns = "source, records:count, quarantined:count, exact:count, near:count, left out:count, may be drawn:count"
    columns += ", held out:count, MB:MB, tokens:count, tokens planned:count"
    reasons = [[n, reason, k] for n, s in sources.items() if n for reason, k in s["quarantined"].items()]
    tables = [
        Table("By source", columns, rows, "Left out: contaminated by an evaluation set, or excluded by name."),
        Table("Quarantined", "source, reason, records:count", reasons),
    ]
    intro = "Where every record went, and how many tokens it became."
    return Section("flow", "Where the documents went", intro, report_figures.flows(sources, plan), tables)


def deduplication(sources: dict[str, Counts], clusters: dict[str, Any]) -> Section | None:
    sources = {name: s for name, s in sources.items() if "kept" in s["documents"]}
    if not sources:
        return None
    rows = []
    for name, s in sources.items():
        count, size = s["documents"], s["bytes"]
        lost = count["near"] / max(1, count["near"] + count["kept"])
        rows.append([name or "all", count["read"], count["exact"], count["near"], lost, size["read"], size.get("kept")])
    columns = "source, documents:count, exact:count, near:count, lost to near:share, MB:MB, MB kept:MB"
    tables = [Table("Loss by source", columns, rows)]
    figures = report_figures.losses(sources)
    if clusters:
        figures.append(report_figures.cluster_sizes(clusters["sizes"]))
        columns = "kept document, origin, documents:count, exact:count, near:count, least alike:number"
        names = ("origin", "documents", "exact", "near", "least_jaccard")
        largest = [[str(row["cluster"]), *(row[name] for name in names)] for row in clusters["largest"]]
        tables.append(Table("The largest clusters", columns, largest))
    intro = "A document is removed only where its text was compared with one that is kept."
    return Section("dedup", "Deduplication", intro, figures, tables, pairs=clusters.get("pairs", []))


def quality(found: dict[str, Any]) -> Section | None:
    if not found:
        return None
    total = max(1, sum(found["languages"].values()))
    languages = [[name, count, count / total] for name, count in found["languages"].items()]
    failed = [[s, rule, n] for s, rules in found["failed"].items() for rule, n in rules.items()]
    hits = [[s, name, n] for s, sets in found["evaluation"].items() for name, n in sets.items()]
    tables = [
        Table("Languages", "language, documents:count, share:share", languages),
        Table("Rules failed", "source, rule, documents:count", sorted(failed, key=lambda row: -row[2]),
              "A document that fails a rule is scored, not removed."),
        Table("Contaminated", "source, evaluation set, documents:count", hits),
    ]  # fmt: skip
    examples: dict[str, list[dict[str, Any]]] = {}
    for tier in reversed(TIERS):
        few = [e | {"source": s} for s, tiers in found["examples"].items() for e in tiers.get(tier, [])]
        examples[tier] = sorted(few, key=lambda e: e["rank"])[:6]
    intro = "Every document has a score and a tier; good ones are repeated, poor ones less often drawn."
    return Section("quality", "Quality", intro, report_figures.quality(found), tables, examples=examples)


def curriculum(outputs: Outputs, config: Config, plan: Plan | None) -> Section | None:
    if plan is None:
        return None
    ends = {s.name: report_data.end(outputs, s.name) for s in plan.stages}
    windows = {s.name: report_data.windows(outputs, s.name) for s in plan.stages}
    wishes = {stage.name: stage.shares.model_dump() for stage in config.mix.stages if stage.shares}
    classes = share_rows(plan, wishes, ends, "length_class")
    sources = share_rows(plan, {s.name: s.asked for s in plan.stages}, ends, "source")
    figures = [report_curves.shares(classes), report_curves.repeated(plan)]
    figures += report_curves.course(windows) + report_curves.attention(plan, ends)
    packed = ("packed", "sequences", "padding_share", "truncated", "dropped", "cut", "segments_per_sequence")
    stages = []
    for stage, e in ((s, ends[s.name]) for s in plan.stages):
        cost = e["sum_of_squares"]["p99"] / stage.context**2 if e else None
        stages.append([stage.name, stage.context, stage.tokens, *(e.get(name) for name in packed), cost])
    columns = "stage, context:count, tokens planned:count, packed:count, sequences:count, padding:share"
    columns += ", truncated:count, dropped:count, cut:count, documents per sequence:number"
    limits = [[x.source, x.tier, x.length_class, x.tokens, x.price * x.tokens / plan.tiers[x.tier]["cap"]]
              for x in plan.limits]  # fmt: skip
    prices = [[s.name, c, price * s.tokens / 100] for s in plan.stages for c, price in s.class_prices.items()]
    tables = [
        Table("Stages", columns + ", attention p99 of context²:share", stages),
        Table("Shares", "stage, of, asked:share, planned:share, achieved:share, tokens:count", classes + sources,
              "By length class, then by source; asked is empty where sources come as they are."),
        Table("Tiers, over all stages", "tier, tokens:count, copies asked:number, planned:number, most drawn:count, "
              "cap:count, cells at the cap:count", tier_rows(plan, ends)),
        Table("Caps that bind", "source, tier, class, tokens:count, price:number", limits,
              "Tokens: drawn at most. Price: nats nearer to what was asked if each might be drawn once more."),
        Table("What a share costs", "stage, class, nats per point:number", prices,
              "One point more of a class; differences count."),
    ]  # fmt: skip
    intro = "What each stage was asked to hold, what the plan gives it, and what was packed."
    return Section("curriculum", "The curriculum", intro, figures, tables)


def share_rows(plan: Plan, asked: dict[str, dict[str, float]], ends: dict[str, Any], kind: str) -> list[list[Any]]:
    """By stage and its length classes or sources: asked, planned and achieved share, planned tokens."""
    rows: list[list[Any]] = []
    for s in plan.stages:
        tokens = report_data.add({getattr(cell, kind): cell.planned} for cell in s.cells)
        packed = ends[s.name].get("shares", {}).get(kind)
        for name in CLASSES if kind == "length_class" else sorted(tokens, key=lambda name: -tokens[name]):
            planned, wish = tokens.get(name, 0), asked.get(s.name, {}).get(name)
            achieved = packed.get(name, [0, 0])[1] if packed else None
            rows.append([s.name, name, wish, planned / max(1, s.tokens), achieved, planned])
    return rows


def tier_rows(plan: Plan, ends: dict[str, dict[str, Any]]) -> list[list[Any]]:
    cells, rows = report_data.copies(plan), []
    for tier, spec in plan.tiers.items():
        mine = [c for c in cells if c["tier"] == tier]
        there = sum(c["available"] for c in mine)
        drawn = [e["most_copies"][tier][0] for e in ends.values() if e and tier in e["most_copies"]]
        bound = sum(limit.tier == tier for limit in plan.limits)
        planned = sum(c["planned"] for c in mine) / max(1, there)
        rows.append([tier, there, spec["copies"], planned, max(drawn, default=None), spec["cap"], bound])
    return rows


def training(stages: list[dict[str, Any]]) -> Section | None:
    if not stages:
        return None
    scores, recall, events = [], [], []
    for s in stages:
        if e := s["evaluation"]:
            for of, by in (("all", {"": e["held_out"]}), ("source", e["sources"]), ("class", e["classes"])):
                scores += [[s["stage"], of, n, x["tokens"], x["loss"], x["bits_per_byte"]] for n, x in by.items()]
            recall += [[s["stage"], x["length"], x["pairs"], x["samples"], x["exact"]] for x in e.get("recall", [])]
        for x in s["events"]:
            events.append([s["stage"], x.get("event"), x["step"], x.get("loss"), len(x.get("documents", []))])
    tables = [
        Table("Held-out documents", "stage, of, name, tokens:count, nats per token:number, bits per byte:number",
              scores),
        Table("Keys and values", "stage, length:count, pairs:count, samples:count, exact:share", recall),
        Table("Skipped steps and spikes", "stage, event, step:count, loss:number, documents:count", events,
              "events.jsonl has them all."),
    ]  # fmt: skip
    intro = "All stages on one axis of tokens; dotted lines: where a stage begins. A long curve is shown as means."
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
