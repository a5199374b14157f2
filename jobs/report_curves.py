"""The report's figures of the curriculum and of training, as Plotly's own JSON."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from jobs.report_data import copies
from jobs.report_figures import CLASS_COLOURS, COLOURS, GREY, SHOWN, Figure, figure, label
from mixer.config import CLASSES, TIERS
from mixer.plan import Plan

WINDOWS = 400  # of the curriculum's course


def shares(rows: list[dict[str, Any]]) -> Figure:
    """Class shares by stage: rows have stage, length_class, asked (or None), planned, achieved (or None)."""
    data: list[dict] = []
    for c in CLASSES:
        mine = [row for row in rows if row["length_class"] == c]
        same = {"x": [label(row["stage"]) for row in mine], "offsetgroup": c, "legendgroup": c}
        marker = {"color": CLASS_COLOURS[c]}
        data.append({"type": "bar", "name": c, "y": [row["planned"] for row in mine], "marker": marker, **same})
        for name, symbol in (("asked", "line-ew-open"), ("achieved", "diamond")):
            point = {"symbol": symbol, "size": 12 if name == "asked" else 8, "color": "#c7843b", "line": {"width": 2}}
            trace = {"type": "scatter", "mode": "markers", "name": name, "marker": point, "showlegend": c == CLASSES[0]}
            data.append(trace | same | {"y": [row[name] for row in mine], "legendgroup": name})
    layout = {"barmode": "group", "scattermode": "group", "yaxis": {"tickformat": ".0%"}, "xaxis": {"type": "category"}}
    return figure("Shares of length classes, by stage", data, layout, "Bars: planned. Marks: asked and achieved.")


def course(stages: list[tuple[str, list[dict[str, int]]]]) -> Figure:
    """Class shares over the whole training, window by window."""
    every = [window for _, windows in stages for window in windows]
    step = -(-len(every) // WINDOWS)
    merged = [
        {c: sum(w.get(c, 0) for w in windows[k : k + step]) for c in CLASSES}
        for _, windows in stages
        for k in range(0, len(windows), step)
    ]
    edges = list(accumulate((sum(w.values()) for w in merged), initial=0))
    steps = [*merged, merged[-1]]  # the last one's end
    data = [
        {"type": "scatter", "mode": "lines", "name": c, "x": edges, "stackgroup": "all",
         "y": [w[c] / max(1, sum(w.values())) for w in steps], "fillcolor": CLASS_COLOURS[c],
         "line": {"shape": "hv", "width": 0, "color": CLASS_COLOURS[c]}}
        for c in CLASSES
    ]  # fmt: skip
    starts = [sum(sum(w.values()) for _, windows in stages[:k] for w in windows) for k in range(len(stages))]
    layout = bounds([name for name, _ in stages], starts)
    layout |= {
        "yaxis": {"tickformat": ".0%", "range": [0, 1]},
        "xaxis": {"title": {"text": "tokens"}, "tickformat": "~s"},
    }
    return figure("Length classes over the training, as packed", data, layout, wide=True)


def bounds(names: list[str], starts: Sequence[float]) -> dict[str, Any]:
    """Where stages begin, as lines and words over a token axis."""
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 1, "dash": "dot", "color": GREY}}
    word = {"yref": "paper", "y": 1, "yanchor": "bottom", "xanchor": "left", "showarrow": False, "font": {"size": 10}}
    return {
        "shapes": [line | {"x0": x, "x1": x} for x in starts[1:]],
        "annotations": [word | {"x": x, "text": label(name, 14)} for name, x in zip(names, starts, strict=True)],
    }


def repeated(plan: Plan) -> Figure:
    """Mean copies of a document over all stages, by tier and class, and the caps."""
    rows = copies(plan)
    data: list[dict] = []
    for c in CLASSES:
        cells = [[r for r in rows if (r["tier"], r["length_class"]) == (t, c)] for t in TIERS]
        y = [sum(r["planned"] for r in few) / max(1, sum(r["available"] for r in few)) for few in cells]
        data.append({"type": "bar", "name": c, "x": TIERS, "y": y, "marker": {"color": CLASS_COLOURS[c]}})
    caps = [plan.tiers[t]["cap"] for t in TIERS]
    line = {"symbol": "line-ew-open", "size": 60, "color": "#b55a5a", "line": {"width": 2}}
    data.append({"type": "scatter", "mode": "markers", "name": "cap", "x": TIERS, "y": caps, "marker": line})
    layout = {"barmode": "group", "xaxis": {"title": {"text": "tier"}}, "yaxis": {"rangemode": "tozero"}}
    return figure("Copies of a document, mean over all stages", data, layout, "The cap holds for every document.")


def attention(ends: dict[str, dict[str, Any]]) -> Figure:
    """What a sequence's attention costs, as a part of one document over the whole context."""
    data = [
        {"type": "bar", "name": name, "x": [label(s) for s in ends], "marker": {"color": colour},
         "y": [e["sum_of_squares"][name] / e["context"] ** 2 for e in ends.values()]}
        for name, colour in zip(("p50", "p99", "max"), CLASS_COLOURS.values(), strict=True)
    ]  # fmt: skip
    layout = {"barmode": "group", "yaxis": {"tickformat": ".0%"}, "xaxis": {"type": "category"}}
    note = "Sum of squared document lengths over the squared context; 100 %: one document fills each sequence."
    return figure("Attention cost of a sequence", data, layout, note)


def training(stages: list[dict[str, Any]]) -> list[Figure]:
    """Curves over one token axis, then what the evaluations found. stages: as from `report_training.stages`."""
    names = [s["stage"] for s in stages]
    axis = {"xaxis": {"title": {"text": "tokens seen"}, "tickformat": "~s"}}
    axis |= bounds(names, [min(s["curve"]["tokens"]) for s in stages])

    def curve(name: str, value: Callable[[float, Any], float] = lambda y, s: y) -> tuple[list, list]:
        x, y = [], []
        for s in stages:
            ys = s["curve"].get(name)
            x += [*s["curve"]["tokens"], None]  # a gap between stages
            y += [*(None if v is None else value(v, s) for v in ys or [None] * len(s["curve"]["tokens"])), None]
        return x, y

    def panel(
        title: str, lines: dict[str, tuple[list, list]], y_axis: dict | None = None, note: str = ""
    ) -> list[Figure]:
        """Nothing where no line has a value."""
        drawn = {name: (x, y) for name, (x, y) in lines.items() if any(v is not None for v in y)}
        data = [
            {"type": "scatter", "mode": "lines", "name": label(name), "x": x, "y": y, "showlegend": len(drawn) > 1,
             "line": {"width": 1.5, "color": GREY if name == "all" else COLOURS[k % 9]}}
            for k, (name, (x, y)) in enumerate(drawn.items())
        ]  # fmt: skip
        return [figure(title, data, axis | {"yaxis": y_axis or {}}, note)] if data else []

    def groups(kind: str) -> dict[str, tuple[list, list]]:
        count: dict[str, int] = {}
        for s in stages:
            for key, values in s["curve"].items():
                if key.startswith(kind + "/"):
                    count[key] = count.get(key, 0) + sum(v is not None for v in values)
        most = sorted(count, key=lambda key: -count[key])[:SHOWN]
        return {key.partition("/")[2]: curve(key) for key in sorted(most)}

    def one(name: str) -> dict[str, tuple[list, list]]:
        return {name: curve(name)}

    nats = {"title": {"text": "nats per token"}}
    found = panel("Loss", one("loss"), nats)
    for kind, by in (("sources", "source"), ("classes", "length class"), ("tiers", "quality tier"), ("copies", "copy")):
        if len(several := groups(kind)) > 1:
            found += panel(f"Loss by {by}", {"all": curve("loss"), **several}, nats)
    found += panel("Learning rate", one("lr"), {"tickformat": "~e"})
    batch = {"batch": curve("sequences", lambda n, s: n * s["context"])}
    found += panel("Batch size", batch, {"tickformat": "~s", "rangemode": "tozero"}, "Tokens of a step, with padding.")
    found += panel("Gradient norm", one("gradient"), {"type": "log"}, "Before clipping.")
    load = {"busiest": curve("load/busiest"), "idlest": curve("load/idlest")}
    found += panel("Expert load", load, note="An expert's share of its layer's work times their number: 1 is even.")
    router = {"entropy, nats": "router_entropy", "balance loss": "balance", "dropped": "drop_rate"}
    found += panel("Router", {name: curve(key) for name, key in router.items()})
    found += panel("Speed", one("tokens_per_second"), {"title": {"text": "tokens per second"}, "rangemode": "tozero"})
    found += panel("Model FLOPs utilisation", one("mfu"), {"tickformat": ".0%", "rangemode": "tozero"})
    if stages[-1]["load"]:
        rows = stages[-1]["load"]
        data = [
            heat(rows, [f"expert {k + 1}" for k in range(len(rows[0]))], [f"layer {k + 1}" for k in range(len(rows))])
        ]
        found.append(figure(f"Load of each expert at the end of {names[-1]}", data, {}, "1 is even."))
    return found + evaluations([s["evaluation"] for s in stages if s["evaluation"]])


def evaluations(found: list[dict[str, Any]]) -> list[Figure]:
    lines = [
        {"type": "scatter", "mode": "lines+markers", "name": label(e["stage"]),
         "x": [p["from"] + 1 for p in e["positions"]], "y": [p["loss"] for p in e["positions"]],
         "line": {"width": 1.5, "color": COLOURS[k % 9]}}
        for k, e in enumerate(found) if e["positions"]
    ]  # fmt: skip
    axes = {"xaxis": {"type": "log", "title": {"text": "position in the document"}, "tickformat": "~s"}}
    nats = {"title": {"text": "nats per token"}}
    figures = [figure("Loss by position, held-out documents", lines, axes | {"yaxis": nats})] if lines else []
    for e in found:
        if cells := {(c["depth"], c["length"]): c["exact"] for c in e["needle"]}:
            depths, lengths = (sorted({key[k] for key in cells}) for k in (0, 1))
            data = heat(
                [[cells.get((d, n)) for n in lengths] for d in depths],
                [f"{n:,}" for n in lengths],
                [f"{d:.0%}" for d in depths],
            )
            layout = {
                "xaxis": {"title": {"text": "tokens"}, "type": "category"},
                "yaxis": {"title": {"text": "depth"}, "type": "category"},
            }
            title = f"Needle in a haystack after {e['stage']}"
            figures.append(figure(title, [data | {"zmin": 0, "zmax": 1}], layout, "Share of samples answered exactly."))
    return figures


def heat(rows: list[list], x: list[str], y: list[str]) -> dict[str, Any]:
    """Cells with their numbers, on a scale that both themes can show."""
    scale = [[0, "#f1efe9"], [0.5, "#8fb4d9"], [1, "#1f3f66"]]
    text = {"texttemplate": "%{z:.2f}", "showscale": False} if len(x) * len(y) <= 200 else {}
    return {"type": "heatmap", "z": rows, "x": x, "y": y, "colorscale": scale, "xgap": 1, "ygap": 1, **text}
