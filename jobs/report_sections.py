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
from mixer.plan import Plan, StagePlan

PACKAGES = ("numpy", "pyarrow", "numba", "tokenizers", "ray", "torch", "plotly")
USER = re.compile(r"(://)[^/@\s]+@")  # a URL's user and password


@dataclass(frozen=True)
class Table:
    """columns: (heading, kind), a kind of FORMATS; rows: a value per column, None: an empty cell."""

    title: str
    columns: list[tuple[str, str]]
    rows: list[list[Any]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    name: str
    title: str
    intro: str
    figures: list[Figure]
    tables: list[Table]
    pairs: list[dict[str, Any]] | tuple = ()
    examples: dict[str, list[dict[str, Any]]] | tuple = ()
    blocks: list[tuple[str, str]] | tuple = ()


def tiles(sources: dict[str, Counts], plan: Plan | None, stages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The figures at the top: (what, how much)."""
    found = []
    if sources:
        count, tokens = sources[""]["documents"], sources[""]["tokens"]
        found.append(("records read", f"{count['read'] + count['quarantined']:,}"))
        if "kept" in count:
            found.append(("documents kept", f"{count['kept']:,}"))
        if tokens:
            found.append(("tokens", f"{tokens:,}"))
    if plan:
        found.append(("tokens planned", f"{sum(s.tokens for s in plan.stages):,}"))
    scores = [s["evaluation"]["held_out"] for s in stages if s["evaluation"]]
    if scores and scores[-1]["loss"] is not None:
        found.append(("held-out loss, nats per token", f"{scores[-1]['loss']:.3f}"))
        if scores[-1]["bits_per_byte"] is not None:
            found.append(("bits per byte", f"{scores[-1]['bits_per_byte']:.3f}"))
    return found


def flow(sources: dict[str, Counts], plan: Plan | None) -> Section | None:
    if not sources:
        return None
    columns = [("source", "text"), *((n, "count") for n in ("records", "quarantined", "exact", "near"))]
    columns += [("left out", "count"), ("may be drawn", "count"), ("held out", "count"), ("MB", "MB")]
    columns += [("tokens", "count"), ("tokens planned", "count")]
    rows = []
    for name, s in sources.items():
        count, cells = s["documents"], s["cells"]
        drawable, held_out = (
            sum(n[0] for (_, c), n in cells.items() if (c == "held out") == held) if cells else None
            for held in (False, True)
        )
        left = count["kept"] - drawable - held_out if cells and "kept" in count else None
        planned = sum(c.planned for x in plan.stages for c in x.cells if name in ("", c.source)) if plan else None
        rows.append([name or "all", count["read"] + count["quarantined"], count["quarantined"], count.get("exact"),
                     count.get("near"), left, drawable, held_out, s["bytes"]["read"], s["tokens"] or None,
                     planned])  # fmt: skip
    reasons = [[n or "all", reason, k] for n, s in sources.items() for reason, k in s["quarantined"].items() if n]
    tables = [Table("By source", columns, rows, "Left out: contaminated by an evaluation set, or excluded by name.")]
    if reasons:
        tables.append(Table("Quarantined", [("source", "text"), ("reason", "text"), ("records", "count")], reasons))
    intro = "Where every record went, and how many tokens it became."
    return Section("flow", "Where the documents went", intro, report_figures.flows(sources, plan), tables)


def deduplication(sources: dict[str, Counts], clusters: dict[str, Any]) -> Section | None:
    if not sources or "kept" not in sources[""]["documents"]:
        return None
    rows = []
    for name, s in sources.items():
        count, size = s["documents"], s["bytes"]
        lost = count["near"] / max(1, count["near"] + count["kept"])
        rows.append([name or "all", count["read"], count["exact"], count["near"], lost, size["read"], size.get("kept")])
    columns = [("source", "text"), *((n, "count") for n in ("documents", "exact", "near")), ("lost to near", "share")]
    tables = [Table("Loss by source", [*columns, ("MB", "MB"), ("MB kept", "MB")], rows)]
    figures = report_figures.losses(sources)
    if clusters:
        figures.append(report_figures.cluster_sizes(clusters["sizes"]))
        columns = [("kept document", "text"), ("origin", "text"), ("documents", "count"), ("exact", "count")]
        names = ("cluster", "origin", "documents", "exact", "near", "least_jaccard")
        largest = [[r[n] if r[n] != r[n] or n != "cluster" else str(r[n]) for n in names] for r in clusters["largest"]]
        columns += [("near", "count"), ("least alike", "number")]
        tables.append(Table("The largest clusters", columns, largest))
    intro = "A document is removed only where its text was compared with one that is kept."
    return Section("dedup", "Deduplication", intro, figures, tables, pairs=clusters.get("pairs", []))


def quality(found: dict[str, Any]) -> Section | None:
    if not found:
        return None
    total = max(1, sum(found["languages"].values()))
    rows = [[name, count, count / total] for name, count in found["languages"].items()]
    tables = [Table("Languages", [("language", "text"), ("documents", "count"), ("share", "share")], rows)]
    failed = [[s, rule, n] for s, rules in found["failed"].items() for rule, n in rules.items()]
    if failed:
        failed.sort(key=lambda row: -row[2])
        columns = [("source", "text"), ("rule", "text"), ("documents", "count")]
        tables.append(Table("Rules failed", columns, failed, "A document that fails a rule is scored, not removed."))
    hits = [[s, name, n] for s, sets in found["evaluation"].items() for name, n in sets.items()]
    if hits:
        columns = [("source", "text"), ("evaluation set", "text"), ("documents", "count")]
        tables.append(Table("Contaminated", columns, hits))
    examples: dict[str, list[dict[str, Any]]] = {}
    for tier in reversed(TIERS):
        few = [e | {"source": s} for s, tiers in found["examples"].items() for e in tiers.get(tier, [])]
        examples[tier] = sorted(few, key=lambda e: e["rank"])[:6]
    intro = "Every document has a score and a tier; good ones are repeated, poor ones less often drawn."
    return Section("quality", "Quality", intro, report_figures.quality(found), tables, examples=examples)


def curriculum(outputs: Outputs, config: Config, plan: Plan | None, ends: dict[str, dict[str, Any]]) -> Section | None:
    if plan is None:
        return None
    asked = {stage.name: stage.shares for stage in config.mix.stages}
    rows = []
    for s in plan.stages:
        wish, is_ = asked.get(s.name), ends.get(s.name, {}).get("shares", {}).get("length_class", {})
        for c in CLASSES:
            got = is_.get(c, [0, 0])[1] if is_ else None
            planned = s.classes.get(c, 0) / max(1, s.tokens)
            row = {"stage": s.name, "length_class": c, "asked": getattr(wish, c) if wish else None}
            rows.append(row | {"planned": planned, "achieved": got, "tokens": s.classes.get(c, 0)})
    figures = [report_curves.shares(rows), report_curves.repeated(plan)]
    windows = [(s.name, report_data.windows(outputs, s.name)) for s in plan.stages]
    if any(w for _, parts in windows for w in parts):
        figures.append(report_curves.course([(name, [w for w in parts if w]) for name, parts in windows]))
    tables = [stage_table(plan, ends), class_table(rows), source_table(plan.stages, ends), tier_table(plan, ends)]
    if ends:
        figures.append(report_curves.attention(ends))
    if plan.limits:
        columns = [("source", "text"), ("tier", "text"), ("class", "text"), ("tokens", "count"), ("price", "number")]
        limits = [[x.source, x.tier, x.length_class, x.tokens, x.price * x.tokens / plan.tiers[x.tier]["cap"]]
                  for x in plan.limits]  # fmt: skip
        note = (
            "Tokens that may be drawn at most. Price: nats nearer to what was asked if each might be drawn once more."
        )
        tables.append(Table("Caps that bind", columns, limits, note))
    prices = [[s.name, c, price * s.tokens / 100] for s in plan.stages for c, price in s.class_prices.items()]
    if prices:
        columns = [("stage", "text"), ("class", "text"), ("nats per point", "number")]
        tables.append(Table("What a share costs", columns, prices, "One point more of a class; differences count."))
    intro = "What each stage was asked to hold, what the plan gives it, and what was packed."
    return Section("curriculum", "The curriculum", intro, figures, tables)


def stage_table(plan: Plan, ends: dict[str, dict[str, Any]]) -> Table:
    columns = [("stage", "text"), ("context", "count"), ("tokens planned", "count"), ("packed", "count")]
    columns += [("sequences", "count"), ("padding", "share"), ("truncated", "count"), ("dropped", "count")]
    columns += [("cut", "count"), ("documents per sequence", "number"), ("attention, p99 of context²", "share")]
    rows = []
    for s in plan.stages:
        e = ends.get(s.name, {})
        packed = [e.get(n) for n in ("packed", "sequences", "padding_share", "truncated", "dropped", "cut")]
        cost = e["sum_of_squares"]["p99"] / s.context**2 if e else None
        rows.append([s.name, s.context, s.tokens, *packed, e.get("segments_per_sequence"), cost])
    return Table("Stages", columns, rows)


def class_table(rows: list[dict[str, Any]]) -> Table:
    names = ("stage", "length_class", "asked", "planned", "achieved", "tokens")
    columns = [("stage", "text"), ("class", "text"), ("asked", "share"), ("planned", "share"), ("achieved", "share")]
    return Table("Length classes", [*columns, ("tokens", "count")], [[row[n] for n in names] for row in rows])


def source_table(stages: tuple[StagePlan, ...], ends: dict[str, dict[str, Any]]) -> Table:
    columns = [("stage", "text"), ("source", "text"), ("asked", "share"), ("planned", "share"), ("achieved", "share")]
    rows = []
    for s in stages:
        planned: dict[str, int] = {}
        for cell in s.cells:
            planned[cell.source] = planned.get(cell.source, 0) + cell.planned
        packed = ends.get(s.name, {}).get("shares", {}).get("source", {})
        for name, tokens in sorted(planned.items(), key=lambda item: -item[1]):
            got = packed.get(name, [0, 0])[1] if packed else None
            rows.append([s.name, name, s.asked.get(name), tokens / max(1, s.tokens), got])
    return Table("Sources", columns, rows, "Asked is empty where sources come as they are.")


def tier_table(plan: Plan, ends: dict[str, dict[str, Any]]) -> Table:
    columns = [("tier", "text"), ("tokens", "count"), ("copies asked", "number"), ("planned", "number")]
    columns += [("most drawn", "count"), ("cap", "count"), ("cells at the cap", "count")]
    cells, rows = report_data.copies(plan), []
    for tier, spec in plan.tiers.items():
        mine = [c for c in cells if c["tier"] == tier]
        there = sum(c["available"] for c in mine)
        drawn = [e["most_copies"][tier][0] for e in ends.values() if tier in e["most_copies"]]
        bound = sum(limit.tier == tier for limit in plan.limits)
        planned = sum(c["planned"] for c in mine) / max(1, there)
        rows.append([tier, there, spec["copies"], planned, max(drawn, default=None), spec["cap"], bound])
    return Table("Tiers, over all stages", columns, rows)


def training(stages: list[dict[str, Any]]) -> Section | None:
    if not stages:
        return None
    columns = [("stage", "text"), ("of", "text"), ("name", "text"), ("tokens", "count")]
    columns += [("nats per token", "number"), ("bits per byte", "number")]
    scores: list[list] = []
    recall: list[list] = []
    events: list[list] = []
    for s in stages:
        e = s["evaluation"]
        for of, by in (("all", {"": e["held_out"]}), ("source", e["sources"]), ("class", e["classes"])) if e else ():
            scores += [[s["stage"], of, n, x["tokens"], x["loss"], x["bits_per_byte"]] for n, x in by.items()]
        recall += [[s["stage"], x["length"], x["pairs"], x["samples"], x["exact"]] for x in e.get("recall", [])]
        about = ("event", "step", "loss", "documents")
        events += [[s["stage"], *(x.get(n) for n in about)] for x in s["events"]["last"]]
    tables = [Table("Held-out documents", columns, scores)] if scores else []
    if recall:
        names = [("length", "count"), ("pairs", "count"), ("samples", "count"), ("exact", "share")]
        tables.append(Table("Keys and values", [("stage", "text"), *names], recall))
    if events:
        names = [("event", "text"), ("step", "count"), ("loss", "number"), ("documents", "count")]
        tables.append(
            Table("Skipped steps and spikes", [("stage", "text"), *names], events, "events.jsonl has them all.")
        )
    intro = "All stages on one axis of tokens; dotted lines: where a stage begins. A long curve is shown as means."
    return Section("training", "Training", intro, report_curves.training(stages), tables)


def provenance(outputs: Outputs, config: Config, plan: Plan | None, command: str) -> Section:
    names = ("step", "version", "place", "partitions", "bytes")
    columns = [("step", "text"), ("version", "number"), ("directory", "text"), ("partitions", "count"), ("MB", "MB")]
    steps = report_data.provenance(outputs)
    rows = [[row[n] for n in names] for row in steps]
    old = ", ".join(row["step"] for row in steps if not row["current"])
    intro = "What made these outputs."
    intro += f" Of another version, and left out above until they are made anew: {old}." if old else ""
    versions: list[list] = [["Python", platform.python_version()], ["Trivium", _version("trivium")]]
    versions += [[name, found] for name in PACKAGES if (found := _version(name))]
    facts = [["seed", plan.seed]] if plan else []
    for name in sorted(outputs.steps):
        if name.startswith("pack-"):
            info = report_data.stage_info(outputs, name)
            facts += [["plan and token ids", info.get("plan", "")], ["tokeniser", info.get("tokenizer", "")]]
    distinct: list[list] = [list(pair) for pair in dict.fromkeys((a, str(b)) for a, b in facts)]
    tables = [
        Table("Steps", columns, rows, "A directory's name ends with the fingerprint of its step, version and options."),
        Table("Fingerprints", [("of", "text"), ("is", "text")], distinct),
        Table("Versions, here and now", [("of", "text"), ("is", "text")], versions),
    ]
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    commands = "\n".join(
        f"python jobs/{line}"
        for line in (
            f"pipeline.py {command}",
            f"dedup.py {command} --explain DOC",
            f"mix.py {command} --explain SOURCE/TIER/CLASS",
            f"report.py {command} --serve",
        )
    )
    blocks = [
        (title, USER.sub(r"\1...@", text)) for title, text in (("Commands", commands), ("Configuration", settings))
    ]
    return Section("provenance", "Provenance", intro, [], [t for t in tables if t.rows], blocks=blocks)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
