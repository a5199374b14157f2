"""What training has left behind, for the report: metrics of a few hundred steps a stage, and evaluations."""

import contextlib
import json
from math import isfinite
from typing import Any

from dataprep import storage
from dataprep.storage import join, read_json
from jobs.report_data import Outputs

POINTS = 600  # of a stage's curve, at most
EVALUATION: dict[str, type] = {"held_out": dict, "sources": dict, "classes": dict, "positions": list, "needle": list}


def stages(outputs: Outputs) -> list[dict[str, Any]]:
    """Of each stage that has begun: `stage`, `steps` (as from `flat`), `evaluation` or None, in training order."""
    run = outputs.steps.get("train")
    found = []
    for stage in outputs.plan.stages if run and outputs.plan else ():
        directory = join(run or "", stage.name)
        if steps := [flat(record, stage.context) for record in thinned(join(directory, "metrics.jsonl"))]:
            evaluation = read_json(join(directory, "evaluation.json"), **EVALUATION)
            evaluation = json.loads(json.dumps(evaluation), parse_constant=lambda _: None)  # a loss that is no number
            found.append({"stage": stage.name, "steps": steps, "evaluation": evaluation})
    return found


def thinned(path: str) -> list[dict[str, Any]]:
    """The records of a file that may be growing, every k-th of them where there are more than POINTS."""
    try:
        lines = storage.read_bytes(path).splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines[:: max(1, -(-len(lines) // POINTS))]:
        with contextlib.suppress(ValueError):  # cut off by a crash, or being written
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and "tokens" in record]


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
