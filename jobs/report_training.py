"""What training has left behind, for the report: metrics thinned to a few hundred points, evaluations, events."""

import contextlib
import json
from collections import Counter, deque
from collections.abc import Iterator
from math import isfinite
from typing import Any

from dataprep import storage
from dataprep.storage import join
from jobs.report_data import Outputs

POINTS = 300  # of a stage's curve, to twice as many
RECENT = 50  # steps that the expert load is a mean of
EVENTS = 20  # the last of them are listed


def stages(outputs: Outputs) -> list[dict[str, Any]]:
    """Of each stage that has begun: `curve`, `load`, `evaluation`, `events`, in the order of training."""
    run = outputs.steps.get("train")
    found = []
    for stage in outputs.plan.stages if run and outputs.plan else ():
        directory = join(run or "", stage.name)
        curve, load, steps = thin(lines(join(directory, "metrics.jsonl")))
        if steps:
            about = {"stage": stage.name, "context": stage.context, "curve": curve, "load": load, "steps": steps}
            found.append(about | {"evaluation": evaluation(directory), "events": events(directory)})
    return found


def lines(path: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file that may be growing; a line that is none is left out."""
    try:
        file = storage.open_file(path)
    except FileNotFoundError:
        return
    with file:
        for line in file:
            with contextlib.suppress(ValueError):
                record = json.loads(line, parse_constant=lambda _: None)
                if isinstance(record, dict) and {"step", "tokens"} <= record.keys():
                    yield record


def thin(records: Iterator[dict[str, Any]]) -> tuple[dict[str, list], list[list[float]], int]:
    """(curves, expert load by layer, steps). A curve: means over equal numbers of steps, None where there is none;
    named by a record's keys, `sources/web` for a nested one. Memory does not grow with the run."""
    bins: list[dict[str, list[float]]] = []  # name -> sum, how many
    width, steps = 1, 0
    recent: deque = deque(maxlen=RECENT)
    for record in records:
        if load := record.pop("expert_load", None):
            recent.append(load)
            everyone = [share for layer in load for share in layer]
            record |= {"load/busiest": max(everyone), "load/idlest": min(everyone)}
        if steps % width == 0:
            bins.append({})
        steps += 1
        for name, value in flat(record):
            pair = bins[-1].setdefault(name, [0.0, 0])
            pair[0] += value
            pair[1] += 1
        if len(bins) == 2 * POINTS and steps % width == 0:
            bins = [_merge(one, other) for one, other in zip(bins[::2], bins[1::2], strict=True)]
            width *= 2
    names = sorted({name for one in bins for name in one})
    curve = {name: [one[name][0] / one[name][1] if name in one else None for one in bins] for name in names}
    same = [load for load in recent if [len(row) for row in load] == [len(row) for row in recent[-1]]]
    mean = [[sum(x) / len(same) for x in zip(*rows, strict=True)] for rows in zip(*same, strict=True)]
    return curve, mean, steps


def flat(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """A record's finite numbers; those of a nested mapping as `key/name`."""
    for key, value in record.items():
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, int | float) and isfinite(number):
                yield (f"{key}/{name}" if name else key), float(number)


def _merge(one: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, list[float]]:
    zero = [0.0, 0]
    names = one.keys() | other.keys()
    return {name: [a + b for a, b in zip(one.get(name, zero), other.get(name, zero), strict=True)] for name in names}


def events(directory: str) -> dict[str, Any]:
    """`counts` by kind, and the `last` ones without their documents."""
    counts: Counter = Counter()
    last: deque = deque(maxlen=EVENTS)
    for event in lines(join(directory, "events.jsonl")):
        counts[str(event.get("event"))] += 1
        documents = event.pop("documents", [])
        last.append(event | {"documents": len(documents)})
    return {"counts": dict(counts), "last": list(last)}


def evaluation(directory: str) -> dict[str, Any]:
    """The stage's evaluation.json; {} where there is none, or one of another form."""
    found = _json(join(directory, "evaluation.json"))
    return found if found.get("schema") == 1 else {}


def _json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(storage.read_bytes(path), parse_constant=lambda _: None)  # a loss that is not a number
    except (FileNotFoundError, ValueError):  # not there, or being written
        return {}
    return found if isinstance(found, dict) else {}
