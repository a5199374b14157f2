"""The report's figures of documents, as Plotly's own JSON: what is drawn; the page's script has fonts and theme."""

from html import escape
from typing import Any

from dedup.explain import printable
from jobs.report_data import Counts, copies
from mixer.config import CLASSES, TIERS
from mixer.plan import Plan

Figure = dict[str, Any]
Link = tuple[str, str, float]
COLOURS = ("#4477aa", "#c7843b", "#4a9a80", "#8a6fae", "#b55a5a", "#7a8b3c", "#5aa3c4", "#b0708e", "#8f7a5a", "#7d8590")
GREY = COLOURS[-1]
TIER_COLOURS = dict(zip(TIERS, ("#b55a5a", "#c7a23b", "#4a9a80"), strict=True))
CLASS_COLOURS = dict(zip(CLASSES, ("#9cc3e6", "#5b8fc7", "#2f5d94"), strict=True))
CLASS_NODES = {"short": "short", "medium": "medium length", "long": "long"}  # a tier is medium, too
SHOWN = 8  # sources and other groups in a figure
BARS = 16  # bars in a figure


def label(name: str, length: int = 40) -> str:
    """A name for Plotly, which reads some markup in its texts."""
    shown = printable(str(name))
    return escape(shown[:length] + ("..." if len(shown) > length else ""))


def figure(
    title: str, data: list[dict], layout: dict[str, Any], note: str = "", height: int = 330, wide: bool = False
) -> Figure:
    return {"title": title, "note": note, "data": data, "layout": layout | {"height": height}, "wide": wide}


def menu(choices: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A choice above a figure: name -> what Plotly restyles; nothing where there is one only."""
    buttons = [{"label": label(name, 24), "method": "restyle", "args": [change]} for name, change in choices.items()]
    place = {"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "pad": {"t": 0, "b": 4}}
    return [{"buttons": buttons, "type": "dropdown", "direction": "down", **place}] if len(buttons) > 1 else []


def bars(
    title: str, names: list[str], parts: dict[str, list[float]], colours: dict[str, str], ticks: str, wide: bool = False
) -> Figure:
    """Stacked horizontal bars: a row per name, a colour per part."""
    data = [
        {"type": "bar", "orientation": "h", "name": label(part), "y": [label(n) for n in names], "x": values,
         "marker": {"color": colours.get(part, GREY)}}
        for part, values in parts.items()
    ]  # fmt: skip
    axis = {"autorange": "reversed", "automargin": True, "type": "category"}
    layout = {"barmode": "stack", "yaxis": axis, "xaxis": {"tickformat": ticks}}
    return figure(title, data, layout, height=max(200, 26 * len(names) + 110), wide=wide)


# -- where documents and tokens went ------------------------------------------------------------------------------


def flows(sources: dict[str, Counts], plan: Plan | None) -> list[Figure]:
    """Two Sankey diagrams, each with a choice of source."""
    largest = sorted(sources, key=lambda s: -sources[s]["documents"]["read"])[: SHOWN + 1]  # "" is the sum: it leads
    documents = {s: document_links(sources[s]) for s in largest}
    tokens = {s: token_links(sources[s], plan, s) for s in largest if sources[s]["tokens"]}
    both = [("Documents", documents, "From the input's records to what may be drawn.")]
    note = (
        "Each repetition counts: tokens drawn again flow in as repeats, so that what enters a length class leaves it."
    )
    both += [("Tokens", tokens, note)] if tokens else []
    return [sankey(title, links, note) for title, links, note in both]


def document_links(s: Counts) -> list[Link]:
    count, cells = s["documents"], s["cells"]
    found = [("records", "quarantined", count["quarantined"])]
    if "kept" not in count:
        return [*found, ("records", "documents", count["read"])]
    found += [("records", "exact copies", count["exact"]), ("records", "near duplicates", count["near"])]
    if not cells:
        return [*found, ("records", "kept", count["kept"])]
    drawable = sum(documents for documents, _ in cells.values())
    return [*found, *left_out("records", s, "documents", count["kept"] - drawable), *cell_links("records", cells, 0)]


def left_out(start: str, s: Counts, unit: str, rest: float) -> list[Link]:
    """What is lost between two steps, by reason where that is known (over all sources), else as one."""
    names = {"duplicate": "duplicates", "contaminated": "contaminated", "excluded": "excluded"}
    if removed := s.get("removed"):
        names = names if unit == "tokens" else {k: v for k, v in names.items() if k != "duplicate"}
        return [(start, name, removed.get(reason, {}).get(unit, 0)) for reason, name in names.items()]
    return [(start, "removed" if unit == "tokens" else "contaminated or excluded", max(0, rest))]


def cell_links(start: str, cells: dict[tuple[str, str], list[int]], unit: int) -> list[Link]:
    tiers: list[Link] = [
        (start, f"{t} quality", sum(n[unit] for (tier, _), n in cells.items() if tier == t)) for t in TIERS
    ]
    ends = {**CLASS_NODES, "held out": "held out"}
    return tiers + [(f"{t} quality", ends[c], cells[t, c][unit]) for t in TIERS for c in ends if (t, c) in cells]


def token_links(s: Counts, plan: Plan | None, source: str) -> list[Link]:
    cells = s["cells"]
    if not cells:
        return [("text", "tokens", s["tokens"])]
    found = left_out("tokens", s, "tokens", s["tokens"] - sum(tokens for _, tokens in cells.values()))
    found += cell_links("tokens", cells, 1)
    if plan is None:
        return found
    rows = [row for row in copies(plan) if source in ("", row["source"])]
    for c, node in CLASS_NODES.items():
        mine = [row for row in rows if row["length_class"] == c]
        once = sum(row["once"] for row in mine)
        found.append(("repeats", node, sum(row["planned"] for row in mine) - once))
        for stage in plan.stages:
            drawn = sum(x.planned for x in stage.cells if x.length_class == c and source in ("", x.source))
            found.append((node, f"stage {stage.name}", drawn))
        found.append((node, "not drawn", sum(row["available"] for row in mine) - once))
    return found


def sankey(title: str, choices: dict[str, list[Link]], note: str) -> Figure:
    """One diagram; a source chooses other widths of the same links."""
    ends = list(dict.fromkeys((a, b) for links in choices.values() for a, b, _ in links))
    nodes = list(dict.fromkeys(name for pair in ends for name in pair))
    width = {s: {(a, b): v for a, b, v in links} for s, links in choices.items()}
    values = {s: [mine.get(pair, 0) for pair in ends] for s, mine in width.items()}
    colours = {f"{tier} quality": colour for tier, colour in TIER_COLOURS.items()}
    colours |= {CLASS_NODES[c]: colour for c, colour in CLASS_COLOURS.items()} | {"held out": "#8a6fae"}
    colours |= {"records": COLOURS[0], "tokens": COLOURS[0], "repeats": "#c7843b", "kept": "#4a9a80"}
    stage = "#5aa3c4"
    node = [colours.get(name, stage if name.startswith("stage ") else GREY) for name in nodes]
    diagram = {
        "type": "sankey",
        "valueformat": ",d",
        "node": {"label": [label(name) for name in nodes], "color": node, "pad": 14, "thickness": 12,
                 "line": {"width": 0}},
        "link": {
            "source": [nodes.index(a) for a, _ in ends],
            "target": [nodes.index(b) for _, b in ends],
            "value": values[next(iter(values))],
            "color": [node[nodes.index(b)] + "66" for _, b in ends],
        },
    }  # fmt: skip
    choice = menu({s or "all sources": {"link.value": [v]} for s, v in values.items()})
    return figure(title, [diagram], {"updatemenus": choice}, note, height=480, wide=True)


# -- deduplication, quality -----------------------------------------------------------------------------------------


def losses(sources: dict[str, Counts]) -> list[Figure]:
    names = sorted((s for s in sources if s), key=lambda s: -sources[s]["documents"]["read"])[:BARS]
    parts = {
        reason: [sources[s]["documents"].get(reason, 0) / max(1, sources[s]["documents"]["read"]) for s in names]
        for reason in ("kept", "near", "exact")
    }
    colours = {"kept": "#4a9a80", "near": "#c7843b", "exact": "#b55a5a"}
    return [bars("Documents kept and removed, by source", names, parts, colours, ".0%")]


def cluster_sizes(sizes: dict[int, int]) -> Figure:
    """Clusters by size, in powers of two."""
    found: dict[int, int] = {}
    for size, number in sizes.items():
        found[size.bit_length()] = found.get(size.bit_length(), 0) + number
    bits = range(min(found), max(found) + 1)
    names = [f"{1 << (k - 1)}–{(1 << k) - 1}" for k in bits]
    data = [{"type": "bar", "x": names, "y": [found.get(k, 0) for k in bits], "marker": {"color": COLOURS[0]}}]
    x = {"title": {"text": "documents in a cluster"}, "type": "category"}
    return figure(
        "Cluster sizes", data, {"xaxis": x, "yaxis": {"type": "log", "dtick": 1, "title": {"text": "clusters"}}}
    )


def quality(found: dict[str, Any]) -> list[Figure]:
    """Scores by tier with a choice of source, tiers by source, and the rules that fail most."""
    scores, tiers = found["scores"], found["tiers"]
    largest = sorted(tiers, key=lambda s: -sum(tiers[s].values()))
    every = {t: [sum(n) for n in zip(*(scores[s][t] for s in scores), strict=True)] for t in TIERS}
    choices = {"all sources": every} | {s: scores[s] for s in largest[:SHOWN]}
    bins = len(every[TIERS[0]])
    data = [
        {"type": "bar", "name": f"{tier} tier", "x": [(k + 0.5) / bins for k in range(bins)], "y": every[tier],
         "width": 1 / bins, "marker": {"color": TIER_COLOURS[tier]}}
        for tier in TIERS
    ]  # fmt: skip
    axes = {"xaxis": {"title": {"text": "score"}}, "yaxis": {"title": {"text": "documents"}}}
    choice = menu({s: {"y": [by_tier[t] for t in TIERS]} for s, by_tier in choices.items()})
    figures = [figure("Scores, by tier", data, {"barmode": "stack", **axes, "updatemenus": choice})]
    shares = {t: [tiers[s].get(t, 0) / max(1, sum(tiers[s].values())) for s in largest[:BARS]] for t in TIERS}
    figures.append(bars("Tiers, by source", largest[:BARS], shares, TIER_COLOURS, ".0%"))
    totals: dict[str, int] = {}
    for by_rule in found["failed"].values():
        for rule, number in by_rule.items():
            totals[rule] = totals.get(rule, 0) + number
    if rules := sorted(totals, key=lambda rule: -totals[rule])[:BARS]:
        parts = {s: [found["failed"].get(s, {}).get(rule, 0) for rule in rules] for s in largest[: SHOWN - 1]}
        if len(largest) > len(parts):
            parts["other sources"] = [totals[r] - sum(p[k] for p in parts.values()) for k, r in enumerate(rules)]
        parts = {s: values for s, values in parts.items() if any(values)}
        title = "Rules that documents fail most"
        figures.append(bars(title, rules, parts, dict(zip(parts, COLOURS, strict=False)), "~s", wide=True))
    return figures
