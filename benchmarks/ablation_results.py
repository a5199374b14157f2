"""The ablation's results: tables of mean and spread over the seeds, and two figures."""

from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import figure, table
from mixer.config import CLASSES

Found = dict[tuple[str, int], dict[str, Any]]  # (arm, seed) -> `read`, and the evaluations `own` and `longest`
Values = dict[str, dict[str, list[float]]]  # row -> column -> a value per seed

DATA = ("raw", "dedup", "filtered", "upsampled")
LENGTH = ("upsampled", "curriculum")  # the former is the one without: a short context only


def show(found: Found, figures: str | None) -> dict[str, float]:
    """Print the tables, and draw the figures into a directory. Returns every mean and spread under a flat name."""
    views = {
        "read": collect(found, lambda arm: arm["read"]),
        "data": collect(found, lambda arm: by_group(arm["own"]), DATA),
        "length": collect(found, lambda arm: by_group(arm["longest"]) | by_length(arm["longest"]), LENGTH),
    }
    seeds = len({seed for _, seed in found})
    print_table(f"What was read, means of {seeds} seeds", views["read"], plain)
    said = (
        "Bits per byte of the held-out text at the context of training. In brackets: the difference from raw, by seed."
    )
    print_table(said, views["data"], with_difference)
    said = (
        "At the longest context: bits per byte; loss by position, nats per token; share of needles and of keys found."
    )
    print_table(said, views["length"], with_difference)
    if figures:
        draw(views["data"], views["length"], Path(figures))
    return {
        f"{view}.{row}.{column}{kind}".replace(" ", "_"): value
        for view, rows in views.items()
        for row, columns in rows.items()
        for column, values in columns.items()
        for kind, value in (("", mean(values)), ("_spread", spread(values)))
    }


def collect(found: Found, values: Callable[[dict], dict[str, float]], arms: tuple[str, ...] = ()) -> Values:
    rows: Values = {}
    for (arm, _), result in sorted(found.items(), key=lambda item: item[0][1]):
        if not arms or arm in arms:
            for row, value in values(result).items():
                rows.setdefault(row, {}).setdefault(arm, []).append(value)
    return {row: {arm: columns[arm] for arm in arms or columns} for row, columns in rows.items()}


def by_group(report: dict[str, Any]) -> dict[str, float]:
    """Bits per byte: the mean of the sources, each of them, each length class."""
    sources, classes = (
        {name: score["bits_per_byte"] for name, score in report[kind].items()} for kind in ("sources", "classes")
    )
    by_class = {f"{name} documents": classes[name] for name in CLASSES if name in classes}
    return {"mean of the sources": mean(sources.values())} | sources | by_class


def by_length(report: dict[str, Any]) -> dict[str, float]:
    """Loss by position, then the share of needles (over all depths) and keys found, by length."""
    found = {f"position {p['from']:,} to {p['to'] - 1:,}": p["loss"] for p in report["positions"]}
    for probe in ("needle", "recall"):
        for length in sorted({cell["length"] for cell in report[probe]}):
            found[f"{probe}, {length:,} tokens"] = mean(c["exact"] for c in report[probe] if c["length"] == length)
    return found


def spread(values: list[float]) -> float:
    """The standard deviation, of a sample."""
    return stdev(values) if len(values) > 1 else 0.0


def plain(values: list[float], base: list[float]) -> str:
    return f"{mean(values):,.3f}" if mean(values) < 1 else f"{mean(values):,.0f}"


def with_difference(values: list[float], base: list[float]) -> str:
    """Mean and spread; beside another column, its difference from that, seed by seed."""
    text = f"{mean(values):.3f} ± {spread(values):.3f}"
    if values is base:
        return text
    differences = [a - b for a, b in zip(values, base, strict=True)]
    return f"{text} ({mean(differences):+.3f} ± {spread(differences):.3f})"


def print_table(title: str, rows: Values, text: Callable[[list[float], list[float]], str]) -> None:
    """text: of a cell, from its values and those of the row's first column."""
    columns = list(next(iter(rows.values())))
    cells = [(row, *(text(values[c], values[columns[0]]) for c in columns)) for row, values in rows.items()]
    table(title, ("", *columns), cells)


def draw(data: Values, length: Values, directory: Path) -> None:
    label = "bits per byte less than raw (right is better), mean and spread"
    with figure(directory / "evidence-data.svg", 7, 0.45 * len(data) + 1, xlabel=label) as axes:
        for number, arm in enumerate(DATA[1:]):
            gains = [[a - b for a, b in zip(row[DATA[0]], row[arm], strict=True)] for row in data.values()]
            places = [place + 0.22 * (number - 1) for place in range(len(gains))]
            axes.errorbar([mean(g) for g in gains], places, xerr=[spread(g) for g in gains], fmt="o", ms=4, label=arm)
            axes.plot(gains, places, ".", color=f"C{number}", ms=3, alpha=0.5)
        axes.axvline(0, color="0.7", linewidth=0.8)
        axes.set_yticks(range(len(data)), list(data))
        axes.invert_yaxis()

    labels = {"xscale": "log", "xlabel": "position in the document (tokens)", "ylabel": "loss, nats per token"}
    with figure(directory / "evidence-length.svg", 7, 3.4, **labels) as axes:
        positions = {int(row.split()[1].replace(",", "")) + 1: row for row in length if row.startswith("position")}
        for arm, name in zip(LENGTH, ("short context only", "curriculum"), strict=True):
            means, spreads = ([f(length[row][arm]) for row in positions.values()] for f in (mean, spread))
            axes.plot(list(positions), means, ".-", label=name)
            low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
            axes.fill_between(list(positions), low, high, alpha=0.2)
