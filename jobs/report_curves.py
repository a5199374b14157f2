"""The report's figures of the curriculum and of training, as Plotly's own JSON."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from dataprep.storage import add_up
from jobs.report_data import copies
from jobs.report_figures import CLASS_COLOURS, COLOURS, GREY, SHOWN, Figure, axis, bar, figure, label
from mixer.config import CLASSES, TIERS
from mixer.plan import Plan

WINDOWS = 400  # of the curriculum's course
NATS = axis("nats per token")


def shares(rows: list[list[Any]]) -> Figure:
    """Class shares by stage. rows: of `plan_report.shares`."""
    data: list[dict] = []
    for c in CLASSES:
        names, _, _, asked, planned, achieved, _ = zip(*(row for row in rows if row[2] == c), strict=True)
        x = [label(name) for name in names]
        data.append(bar(c, x, list(planned), CLASS_COLOURS[c], offsetgroup=c, legendgroup=c))
        for name, y, symbol, size in (("asked", asked, "line-ew-open", 12), ("achieved", achieved, "diamond", 8)):
            more = {"offsetgroup": c, "legendgroup": name, "showlegend": c == CLASSES[0]}
            data.append(marks(name, x, list(y), symbol, size, "#c7843b") | more)
    layout = {"barmode": "group", "scattermode": "group", "yaxis": axis(ticks=".0%"), "xaxis": axis(type="category")}
    return figure("Shares of length classes, by stage", data, layout, "Bars: planned. Marks: asked and achieved.")


def marks(name: str, x: list, y: list, symbol: str, size: int, colour: str) -> dict[str, Any]:
    marker = {"symbol": symbol, "size": size, "color": colour, "line": {"width": 2}}
    return {"type": "scatter", "mode": "markers", "name": name, "x": x, "y": y, "marker": marker}


def course(stages: dict[str, list[dict[str, int]]]) -> list[Figure]:
    """Class shares over the whole training, window by window; stages: tokens by class of each window."""
    stages = {name: windows for name, windows in stages.items() if any(windows)}
    if not stages:
        return []
    step = -(-sum(map(len, stages.values())) // WINDOWS)
    merged = {n: [add_up(windows[k : k + step]) for k in range(0, len(windows), step)] for n, windows in stages.items()}
    every = [window for windows in merged.values() for window in windows]
    edges = list(accumulate((sum(window.values()) for window in every), initial=0))
    firsts = accumulate((len(windows) for windows in merged.values()), initial=0)
    data = [
        {"type": "scatter", "mode": "lines", "name": c, "x": edges, "stackgroup": "all",
         "y": [w.get(c, 0) / max(1, sum(w.values())) for w in (*every, every[-1])], "fillcolor": CLASS_COLOURS[c],
         "line": {"shape": "hv", "width": 0, "color": CLASS_COLOURS[c]}}
        for c in CLASSES
    ]  # fmt: skip
    layout = {"yaxis": axis(ticks=".0%", range=[0, 1]), "xaxis": axis("tokens", "~s")}
    layout |= bounds(list(stages), [edges[first] for first in firsts][:-1])
    return [figure("Length classes over the training, as packed", data, layout, wide=True)]


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
    rows, data = copies(plan), []
    for c in CLASSES:
        cells = [[row for row in rows if (row["tier"], row["length_class"]) == (tier, c)] for tier in TIERS]
        means = [sum(r["planned"] for r in mine) / max(1, sum(r["available"] for r in mine)) for mine in cells]
        data.append(bar(c, list(TIERS), means, CLASS_COLOURS[c]))
    caps = [plan.tiers[t]["cap"] for t in TIERS]
    data.append(marks("cap", list(TIERS), caps, "line-ew-open", 60, "#b55a5a"))
    layout = {"barmode": "group", "xaxis": axis("tier"), "yaxis": axis(rangemode="tozero")}
    return figure("Copies of a document, mean over all stages", data, layout, "The cap holds for every document.")


def training(stages: list[dict[str, Any]]) -> list[Figure]:
    """Curves over one token axis, then what the evaluations found. stages: as from `report_training.stages`."""
    steps = [step for s in stages for step in (*s["steps"], {})]  # a gap between stages
    x = [step.get("tokens") for step in steps]
    axes = {"xaxis": axis("tokens seen", "~s")} | bounds(
        [s["stage"] for s in stages], [s["steps"][0]["tokens"] for s in stages]
    )

    def panel(title: str, curves: dict[str, str], y_axis: dict, note: str = "") -> list[Figure]:
        """curves: name -> key of a step. Nothing where no curve has a value."""
        drawn = {name: [step.get(key) for step in steps] for name, key in curves.items()}
        drawn = {name: y for name, y in drawn.items() if any(v is not None for v in y)}
        data = [
            line(name, x, y, GREY if name == "all" else COLOURS[k % 9], showlegend=len(drawn) > 1)
            for k, (name, y) in enumerate(drawn.items())
        ]
        return [figure(title, data, axes | {"yaxis": y_axis}, note)] if data else []

    found = panel("Loss", {"loss": "loss"}, NATS)
    for kind, by in (("sources", "source"), ("classes", "length class"), ("tiers", "quality tier"), ("copies", "copy")):
        values = Counter(key for step in steps for key in step if key.startswith(f"{kind}/"))
        if len(values) > 1:
            most = {key.partition("/")[2]: key for key, _ in sorted(values.most_common(SHOWN))}
            found += panel(f"Loss by {by}", {"all": "loss", **most}, NATS)
    zero = {"rangemode": "tozero"}
    load = {"busiest": "load/busiest", "idlest": "load/idlest"}
    return [
        *found,
        *panel("Learning rate", {"lr": "lr"}, axis(ticks="~e")),
        *panel("Batch size", {"batch": "batch"}, axis(ticks="~s", **zero), "Tokens of a step, with padding."),
        *panel("Gradient norm", {"gradient": "gradient"}, axis(type="log"), "Before clipping."),
        *panel("Expert load", load, axis(), "An expert's share of its layer's work times their number: 1 is even."),
        *panel("Speed", {"speed": "tokens_per_second"}, axis("tokens per second", **zero)),
        *panel("Model FLOPs utilisation", {"mfu": "mfu"}, axis(ticks=".0%", **zero)),
        *evaluations({s["stage"]: s["evaluation"] for s in stages if s["evaluation"]}),
    ]


def line(name: str, x: list, y: list, colour: str, **more: Any) -> dict[str, Any]:
    shown = {"type": "scatter", "mode": "lines", "name": label(name), "x": x, "y": y}
    return shown | {"line": {"width": 1.5, "color": colour}, **more}


def evaluations(found: dict[str, dict[str, Any]]) -> list[Figure]:
    lines = []
    for k, (stage, e) in enumerate(found.items()):
        if places := e["positions"]:
            x, y = [p["from"] + 1 for p in places], [p["loss"] for p in places]
            lines.append(line(stage, x, y, COLOURS[k % 9], mode="lines+markers"))
    layout = {"xaxis": axis("position in the document", "~s", type="log"), "yaxis": NATS}
    figures = [figure("Loss by position, held-out documents", lines, layout)] if lines else []
    for stage, e in found.items():
        if cells := {(c["depth"], c["length"]): c["exact"] for c in e["needle"]}:
            depths, lengths = (sorted({key[k] for key in cells}) for k in (0, 1))
            data = {
                "type": "heatmap",
                "x": [f"{n:,}" for n in lengths],
                "y": [f"{d:.0%}" for d in depths],
                "z": [[cells.get((d, n)) for n in lengths] for d in depths],
                "zmin": 0,
                "zmax": 1,
                "colorscale": [[0, "#f1efe9"], [0.5, "#8fb4d9"], [1, "#1f3f66"]],
                "texttemplate": "%{z:.2f}",
                "showscale": False,
            }
            layout = {"xaxis": axis("tokens", type="category"), "yaxis": axis("depth", type="category")}
            title = f"Needle in a haystack after {stage}"
            figures.append(figure(title, [data], layout, "Share of samples answered exactly."))
    return figures
