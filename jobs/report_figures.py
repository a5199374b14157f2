"""The report's figures of documents, as Plotly's own JSON: what is drawn; the page's script has fonts and theme."""

from html import escape
from typing import Any

from dedup.explain import printable
from jobs.report_data import Counts, add, copies
from mixer.config import CLASSES, TIERS
from mixer.plan import Plan

Figure = dict[str, Any]
Link = tuple[str, str, float]
COLOURS = ("#4477aa", "#c7843b", "#4a9a80", "#8a6fae", "#b55a5a", "#7a8b3c", "#5aa3c4", "#b0708e", "#8f7a5a", "#7d8590")
GREY = COLOURS[-1]
TIER_COLOURS = dict(zip(TIERS, ("#b55a5a", "#c7a23b", "#4a9a80"), strict=True))
CLASS_COLOURS = dict(zip(CLASSES, ("#9cc3e6", "#5b8fc7", "#2f5d94"), strict=True))
CLASS_NODES = {"short": "short", "medium": "medium length", "long": "long"}  # a tier is medium, too
NODE_COLOURS = {f"{tier} quality": colour for tier, colour in TIER_COLOURS.items()}
NODE_COLOURS |= {CLASS_NODES[c]: colour for c, colour in CLASS_COLOURS.items()} | {"held out": "#8a6fae"}
NODE_COLOURS |= {"records": COLOURS[0], "tokens": COLOURS[0], "repeats": "#c7843b", "kept": "#4a9a80"}
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


def axis(title: str = "", ticks: str = "", **more: Any) -> dict[str, Any]:
    return ({"title": {"text": title}} if title else {}) | {"tickformat": ticks, **more}


def bar(name: str, x: list, y: list, colour: str, **more: Any) -> dict[str, Any]:
    return {"type": "bar", "name": label(name), "x": x, "y": y, "marker": {"color": colour}, **more}


def bars(title: str, names: list[str], parts: dict[str, list[float]], colours: dict[str, str], ticks: str) -> Figure:
    """Stacked horizontal bars: a row per name, a colour per part."""
    rows = [label(name) for name in names]
    data = [bar(part, x, rows, colours.get(part, GREY), orientation="h") for part, x in parts.items()]
    rising = axis(autorange="reversed", automargin=True, type="category")
    layout = {"barmode": "stack", "yaxis": rising, "xaxis": axis(ticks=ticks)}
    return figure(title, data, layout, height=max(200, 26 * len(names) + 110))


def menu(choices: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A choice above a figure: name -> what Plotly restyles; none where there is one only."""
    buttons = [{"label": label(name, 24), "method": "restyle", "args": [change]} for name, change in choices.items()]
    place = {"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "pad": {"t": 0, "b": 4}}
    shown = {"buttons": buttons, "type": "dropdown", "direction": "down", **place}
    return {"updatemenus": [shown] if len(buttons) > 1 else []}


# -- where documents and tokens went ------------------------------------------------------------------------------


def flows(sources: dict[str, Counts], plan: Plan | None) -> list[Figure]:
    """Two Sankey diagrams, each with a choice of source."""
    largest = list(sources)[: SHOWN + 1]  # "" is the sum: it leads
    documents = {s: document_links(sources[s]) for s in largest}
    tokens = {s: token_links(sources[s], plan, s) for s in largest if sources[s]["tokens"]}
    figures = [sankey("Documents", documents, "From the input's records to what may be drawn.")]
    repeats = (
        "Each repetition counts: tokens drawn again flow in as repeats, so that what enters a length class leaves it."
    )
    return figures + ([sankey("Tokens", tokens, repeats)] if tokens else [])


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
    names = {"duplicate": "duplicates"} if unit == "tokens" else {}
    names |= {"contaminated": "contaminated", "excluded": "excluded"}
    if removed := s.get("removed"):
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
    rows = [row for row in copies(plan) if source in ("", row["source"])] if plan else []
    for c, node in CLASS_NODES.items() if plan else ():
        mine = [row for row in rows if row["length_class"] == c]
        once = sum(row["once"] for row in mine)
        found.append(("repeats", node, sum(row["planned"] for row in mine) - once))
        for stage in plan.stages if plan else ():
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
    colours = [NODE_COLOURS.get(name, "#5aa3c4" if name.startswith("stage ") else GREY) for name in nodes]
    diagram = {
        "type": "sankey",
        "valueformat": ",d",
        "node": {"label": [label(name) for name in nodes], "color": colours, "pad": 14, "thickness": 12,
                 "line": {"width": 0}},
        "link": {
            "source": [nodes.index(a) for a, _ in ends],
            "target": [nodes.index(b) for _, b in ends],
            "value": next(iter(values.values())),
            "color": [colours[nodes.index(b)] + "66" for _, b in ends],
        },
    }  # fmt: skip
    choice = menu({s or "all sources": {"link.value": [v]} for s, v in values.items()})
    return figure(title, [diagram], choice, note, height=480, wide=True)


# -- deduplication, quality -----------------------------------------------------------------------------------------


def losses(sources: dict[str, Counts]) -> list[Figure]:
    names = [s for s in sources if s][:BARS]
    counts = [sources[s]["documents"] for s in names]
    parts = {reason: [n[reason] / max(1, n["read"]) for n in counts] for reason in ("kept", "near", "exact")}
    colours = {"kept": "#4a9a80", "near": "#c7843b", "exact": "#b55a5a"}
    return [bars("Documents kept and removed, by source", names, parts, colours, ".0%")]


def cluster_sizes(sizes: dict[int, int]) -> Figure:
    """Clusters by size, in powers of two."""
    found = add({size.bit_length(): number} for size, number in sizes.items())
    bits = range(min(found), max(found) + 1)
    names = [f"{1 << (k - 1)}–{(1 << k) - 1}" for k in bits]
    data = [bar("clusters", names, [found.get(k, 0) for k in bits], COLOURS[0])]
    x, y = axis("documents in a cluster", type="category"), axis("clusters", type="log", dtick=1)
    return figure("Cluster sizes", data, {"xaxis": x, "yaxis": y})


def quality(found: dict[str, Any]) -> list[Figure]:
    """Scores by tier with a choice of source, tiers by source, and the rules that fail most."""
    scores, tiers = found["scores"], found["tiers"]
    largest = sorted(tiers, key=lambda s: -sum(tiers[s].values()))[:BARS]
    choices = {"all sources": add(scores.values())} | {s: scores[s] for s in largest[:SHOWN]}
    every = choices["all sources"]
    bins = len(every[TIERS[0]])
    middles = [(k + 0.5) / bins for k in range(bins)]
    data = [bar(f"{tier} tier", middles, every[tier], TIER_COLOURS[tier], width=1 / bins) for tier in TIERS]
    layout = {"barmode": "stack", "xaxis": axis("score"), "yaxis": axis("documents")}
    layout |= menu({s: {"y": [by_tier[t] for t in TIERS]} for s, by_tier in choices.items()})
    shares = {t: [tiers[s].get(t, 0) / max(1, sum(tiers[s].values())) for s in largest] for t in TIERS}
    figures = [figure("Scores, by tier", data, layout), bars("Tiers, by source", largest, shares, TIER_COLOURS, ".0%")]
    totals = add(found["failed"].values())
    if rules := sorted(totals, key=lambda rule: -totals[rule])[:BARS]:
        parts = {s: [found["failed"].get(s, {}).get(rule, 0) for rule in rules] for s in largest[: SHOWN - 1]}
        rest = [totals[rule] - sum(part[k] for part in parts.values()) for k, rule in enumerate(rules)]
        parts = {s: values for s, values in (parts | {"other sources": rest}).items() if any(values)}
        colours = dict(zip(parts, COLOURS, strict=False))
        figures.append(bars("Rules that documents fail most", rules, parts, colours, "~s") | {"wide": True})
    return figures
