"""Checkpoints: torch DCP for weights and moments (any number of ranks reads them back), `checkpoint.json` for the rest.

A checkpoint is written under a temporary name and becomes `step-NNNNNNNN` by one rename, so one that exists is whole.
DCP unpickles a file of its own (`.metadata`) when it loads: load checkpoints only from where this trainer wrote them.
"""

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dataprep.storage import read_json, write_json
from trainer.model import Decoder
from trainer.parallel import World

NAME = re.compile(r"step-\d{8}")
INFO = "checkpoint.json"


@dataclass
class Progress:
    """How far training is."""

    stage: str
    step: int = 0  # optimiser steps, over all stages
    tokens: int = 0  # tokens seen (padding not counted), over all stages
    stage_tokens: int = 0  # ... in this stage
    sequence: int = 0  # the next sequence of this stage's shards


def save(
    directory: Path, model: Decoder, optimizer: torch.optim.Optimizer, progress: Progress, about: dict[str, Any],
    world: World, keep: int,
) -> Path:  # fmt: skip
    """Commit a checkpoint, remove all but the last `keep`, return its path. `about` goes into checkpoint.json too."""
    final = directory / f"step-{progress.step:08d}"
    temporary = directory / f".tmp-{final.name}"
    if world.rank == 0:
        for leftover in (*directory.glob(".tmp-step-*"), final):
            shutil.rmtree(leftover, ignore_errors=True)
    world.barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(temporary))
    if world.rank == 0:
        write_json(str(temporary / INFO), about | asdict(progress))
        os.replace(temporary, final)
        for old in checkpoints(directory)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return final


def load(path: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> Progress:
    """Read weights and moments back, on any number of ranks; returns where that training was."""
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=str(path))  # in place
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    info = read_info(path)
    return Progress(**{name: info[name] for name in Progress.__dataclass_fields__})


def read_info(path: Path) -> dict[str, Any]:
    return read_json(str(path / INFO))


def newest(directory: Path) -> Path | None:
    return max(checkpoints(directory), default=None)


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a stage's directory, oldest first."""
    return sorted(p for p in directory.glob("step-*") if NAME.fullmatch(p.name) and (p / INFO).exists())
