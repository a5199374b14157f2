"""The report's figures of documents, as Plotly's own JSON: what is drawn; the page's script has fonts and theme."""

from html import escape
from typing import Any

from dataprep.storage import add_up
from dedup.explain import printable
from jobs.report_data import copies
from mixer.config import CLASSES, TIERS
from mixer.plan import Plan

Figure = dict[str, Any]
Link = tuple[str, str, float]
COLOURS = ("#4477aa", "#c7843b", "#4a9a80", "#8a6fae", "#b55a5a", "#7a8b3c", "#5aa3c4", "#b0708e", "#8f7a5a", "#7d8590")
GREY = COLOURS[-1]
TIER_COLOURS = dict(zip(TIERS, ("#b55a5a", "#c7a23b", "#4a9a80"), strict=True))
CLASS_COLOURS = dict(zip(CLASSES, ("#9cc3e6", "#5b8fc7", "#2f5d94"), strict=True))
REASON_COLOURS = {"kept": "#4a9a80", "near": "#c7843b", "exact": "#b55a5a"}
NODE_COLOURS = {f"{tier} quality": colour for tier, colour in TIER_COLOURS.items()} | CLASS_COLOURS
NODE_COLOURS |= {"held out": "#8a6fae", "records": COLOURS[0], "tokens": COLOURS[0], "repeats": "#c7843b"}
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
    """A choice above a figure: source ("": all) -> what Plotly restyles; none where there is one only."""
    buttons = [
        {"label": label(name or "all sources", 24), "method": "restyle", "args": [change]}
        for name, change in choices.items()
    ]
    place = {"x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "pad": {"t": 0, "b": 4}}
    shown = {"buttons": buttons, "type": "dropdown", "direction": "down", **place}
    return {"updatemenus": [shown] if len(buttons) > 1 else []}


# -- where documents and tokens went ------------------------------------------------------------------------------


def flows(sources: dict[str, dict[str, Any]], plan: Plan | None) -> list[Figure]:
    """Two Sankey diagrams, each with a choice of source; "" is the sum, it leads."""
    largest = list(sources)[: SHOWN + 1]
    documents = {s: document_links(sources[s]) for s in largest}
    tokens = {s: token_links(sources[s], plan, s) for s in largest if sources[s].get("tokens")}
    figures = [sankey("Documents", documents, "Left out: contaminated by an evaluation set, or excluded by name.")]
    note = "Left out: duplicates too. Tokens drawn again flow in as repeats, so that what enters a class leaves it."
    return figures + ([sankey("Tokens", tokens, note)] if tokens else [])


def document_links(s: dict[str, Any]) -> list[Link]:
    count = {reason: counts["documents"] for reason, counts in s.get("verdicts", {}).items()}
    read, cells = s.get("read", 0), s.get("cells", {})
    found: list[Link] = [("records", "quarantined", sum(s.get("quarantined", {}).values()))]
    if not count:
        return [*found, ("records", "documents", read)]
    found += [("records", f"{reason} duplicates", count.get(reason, 0)) for reason in ("exact", "near")]
    if not cells:
        return [*found, ("records", "kept", count.get("kept", 0))]
    return found + cell_links("records", cells, 0, count.get("kept", 0))


def cell_links(start: str, cells: dict[tuple[str, str], list[int]], unit: int, whole: int) -> list[Link]:
    """What may be drawn, of a `whole` of documents or tokens (unit 0, 1), by tier and then by length class."""
    amounts = {cell: int(both[unit]) for cell, both in cells.items()}
    by_tier = {t: sum(n for (tier, _), n in amounts.items() if tier == t) for t in TIERS}
    found: list[Link] = [(start, "left out", max(0, whole - sum(amounts.values())))]
    found += [(start, f"{tier} quality", n) for tier, n in by_tier.items()]
    return found + [(f"{tier} quality", c, n) for (tier, c), n in amounts.items()]


def token_links(s: dict[str, Any], plan: Plan | None, source: str) -> list[Link]:
    if "cells" not in s:
        return [("text", "tokens", s["tokens"])]
    found = cell_links("tokens", s["cells"], 1, s["tokens"])
    rows = [row for row in copies(plan) if source in ("", row["source"])] if plan else []
    for c in CLASSES if plan else ():
        mine = [row for row in rows if row["length_class"] == c]
        once = sum(row["once"] for row in mine)
        found.append(("repeats", c, sum(row["planned"] for row in mine) - once))
        for stage in plan.stages if plan else ():
            drawn = sum(x.planned for x in stage.cells if x.length_class == c and source in ("", x.source))
            found.append((c, f"stage {stage.name}", drawn))
        found.append((c, "not drawn", sum(row["available"] for row in mine) - once))
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
    choice = menu({s: {"link.value": [v]} for s, v in values.items()})
    return figure(title, [diagram], choice, note, height=480, wide=True)


# -- deduplication, quality -----------------------------------------------------------------------------------------


def losses(verdicts: dict[str, dict[str, dict[str, int]]]) -> Figure:
    names = list(verdicts)[:BARS]
    counts = [{reason: n["documents"] for reason, n in verdicts[s].items()} for s in names]
    parts = {reason: [n.get(reason, 0) / sum(n.values()) for n in counts] for reason in REASON_COLOURS}
    return bars("Documents kept and removed, by source", names, parts, REASON_COLOURS, ".0%")


def cluster_sizes(sizes: dict[int, int]) -> Figure:
    """Clusters by size, in powers of two."""
    bits = range(min(sizes).bit_length(), max(sizes).bit_length() + 1)
    counts = [sum(n for size, n in sizes.items() if size.bit_length() == k) for k in bits]
    names = [f"{1 << (k - 1)}–{(1 << k) - 1}" for k in bits]
    data = [bar("clusters", names, counts, COLOURS[0])]
    x, y = axis("documents in a cluster", type="category"), axis("clusters", type="log", dtick=1)
    return figure("Cluster sizes", data, {"xaxis": x, "yaxis": y})


def quality(found: dict[str, Any]) -> list[Figure]:
    """Scores by tier with a choice of source, and the rules that fail most."""
    scores = {"": add_up(found["scores"].values()), **found["scores"]}
    largest = sorted(scores, key=lambda s: -sum(n.sum() for n in scores[s].values()))[: SHOWN + 1]
    choices = {s: [scores[s][t].tolist() for t in TIERS] for s in sorted(largest)}
    bins = len(choices[""][0])
    middles = [(k + 0.5) / bins for k in range(bins)]
    data = [
        bar(f"{t} tier", middles, y, TIER_COLOURS[t], width=1 / bins) for t, y in zip(TIERS, choices[""], strict=True)
    ]
    layout = {"barmode": "stack", "xaxis": axis("score"), "yaxis": axis("documents")}
    figures = [figure("Scores, by tier", data, layout | menu({s: {"y": y} for s, y in choices.items()}))]
    totals = add_up(found["failed"].values())
    if rules := sorted(totals, key=lambda rule: -totals[rule])[:BARS]:
        parts = {s: [found["failed"].get(s, {}).get(rule, 0) for rule in rules] for s in choices if s}
        rest = [totals[rule] - sum(part[k] for part in parts.values()) for k, rule in enumerate(rules)]
        parts = {s: values for s, values in (parts | {"other sources": rest}).items() if any(values)}
        colours = dict(zip(parts, COLOURS, strict=False))
        figures.append(bars("Rules that documents fail most", rules, parts, colours, "~s"))
    return figures
