"""What training has left behind, for the report: metrics thinned to a few hundred points, evaluations, events."""

import contextlib
import json
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from math import isfinite, nan
from typing import Any

import numpy as np

from dataprep import storage
from dataprep.storage import join
from jobs.report_data import Outputs

POINTS = 600  # of a stage's curve, at most
EVENTS = 20  # the last of them are listed
EVALUATION: dict[str, type] = {"held_out": dict, "sources": dict, "classes": dict}
EVALUATION |= {"cells": list, "positions": list, "needle": list, "recall": list}


def stages(outputs: Outputs) -> list[dict[str, Any]]:
    """Of each stage that has begun: `stage`, `curve`, `evaluation`, `events`, in the order of training."""
    run = outputs.steps.get("train")
    found = []
    for stage in outputs.plan.stages if run and outputs.plan else ():
        directory = join(run or "", stage.name)
        if curve := thin(flat(record, stage.context) for record in lines(join(directory, "metrics.jsonl"))):
            events = list(deque(lines(join(directory, "events.jsonl")), EVENTS))
            about = {"stage": stage.name, "curve": curve, "events": events}
            found.append(about | {"evaluation": evaluation(join(directory, "evaluation.json"))})
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


def flat(record: dict[str, Any], context: int) -> dict[str, float]:
    """A step's finite numbers; those of a nested mapping as `key/name`."""
    found = {}
    for key, value in record.items():
        for name, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, int | float) and isfinite(number):
                found[f"{key}/{name}" if name else key] = float(number)
    if load := [share for layer in record.get("expert_load") or [] for share in layer]:
        found |= {"load/busiest": max(load), "load/idlest": min(load)}
    return found | ({"batch": found["sequences"] * context} if "sequences" in found else {})


def thin(steps: Iterable[dict[str, float]]) -> dict[str, list[float | None]]:
    """Curves by name: means over equal numbers of steps, None where none of them has a value."""
    columns: dict[str, array] = {}
    number = 0
    for values in steps:
        for name, value in values.items():
            column = columns.setdefault(name, array("d"))
            column.extend([nan] * (number - len(column)))  # the steps without
            column.append(value)
        number += 1
    width = max(1, -(-number // POINTS))
    curves = {}
    for name, column in columns.items():
        column.extend([nan] * (-(-number // width) * width - len(column)))
        bins = np.frombuffer(column).reshape(-1, width)
        there = (~np.isnan(bins)).sum(1)
        means = np.nansum(bins, 1) / np.maximum(there, 1)
        curves[name] = [mean if n else None for mean, n in zip(means.tolist(), there, strict=True)]
    return curves


def evaluation(path: str) -> dict[str, Any]:
    """A stage's evaluation.json; {} where there is none, or one of another form."""
    try:
        found = json.loads(storage.read_bytes(path), parse_constant=lambda _: None)  # a loss that is not a number
    except (FileNotFoundError, ValueError):  # not there, or being written
        return {}
    if not isinstance(found, dict) or found.get("schema") != 1:
        return {}
    return found if all(isinstance(found.get(key), kind) for key, kind in EVALUATION.items()) else {}
