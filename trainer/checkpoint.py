"""Checkpoints: torch DCP for weights and moments (any number of ranks reads them back), `checkpoint.json` for the rest.

A checkpoint is written under a temporary name and becomes `step-NNNNNNNN` by one rename, so one that exists is whole.
DCP unpickles a file of its own (`.metadata`) when it loads: load checkpoints only from where this trainer wrote them.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dataprep.storage import UserError, explain_os_error, read_json, write_json
from trainer.model import Decoder
from trainer.parallel import World

NAME = re.compile(r"step-\d{8}")
INFO = "checkpoint.json"


class Damaged(UserError):
    """A checkpoint that cannot be read."""

    @classmethod
    def at(cls, *paths: Path) -> "Damaged":
        which = ", ".join(map(str, paths))
        return cls(f"checkpoint {which} is damaged; remove it and run the same command again")


@dataclass
class Progress:
    """How far training is."""

    stage: str
    step: int = 0  # optimiser steps, over all stages
    tokens: int = 0  # tokens seen (padding not counted), over all stages
    stage_tokens: int = 0  # ... in this stage
    sequence: int = 0  # the next sequence of this stage's shards

    @property
    def checkpoint(self) -> str:
        return f"step-{self.step:08d}"


def save(
    directory: Path, model: Decoder, optimizer: torch.optim.Optimizer, progress: Progress, about: dict[str, Any],
    world: World, keep: int,
) -> Path:  # fmt: skip
    """Commit a checkpoint, remove all but the last `keep`, return its path. `about` goes into checkpoint.json too.

    Raises UserError where the disk is full.
    """
    final = directory / progress.checkpoint
    temporary = directory / f".tmp-{final.name}"
    if world.rank == 0:
        for leftover in (*directory.glob(".tmp-step-*"), final):
            shutil.rmtree(leftover, ignore_errors=True)
    world.barrier()
    weights, moments = get_state_dict(model, optimizer)

    def commit() -> None:
        write_json(str(temporary / INFO), about | asdict(progress))
        os.replace(temporary, final)
        there = checkpoints(directory)
        kept = [c for c in there if c <= final][-keep:]  # what lies beyond this one was damaged, or it would not be
        for old in set(there) - set(kept):
            shutil.rmtree(old)

    try:
        with explained(final):
            dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=str(temporary))
        world.broadcast(commit)
    finally:
        if world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """A full disk or a forbidden path, met while writing under `path`, as a UserError."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        for failure in causes(error):
            number, where = getattr(failure, "errno", None), getattr(failure, "filename", None)
            if "PytorchStreamWriter" in str(failure) or "inline_container" in str(failure):
                number = errno.ENOSPC  # torch's zip writer says only that a write failed
            if mistake := explain_os_error(OSError(number, "", where or str(path))):
                raise mistake from error
        raise


def causes(error: BaseException) -> list[BaseException]:
    """What went wrong on each rank."""
    return [e for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]


def load(path: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> Progress:
    """Read weights and moments back, on any number of ranks; returns where that training was. May raise Damaged."""
    info = read_info(path)
    weights, moments = get_state_dict(model, optimizer)
    read_tensors(path, {"model": weights, "optimizer": moments})
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return Progress(**{f.name: info[f.name] for f in fields(Progress)})


def read_info(path: Path) -> dict[str, Any]:
    """What checkpoint.json says. Raises Damaged where it, or DCP's own `.metadata`, cannot be read."""
    try:
        info = read_json(str(path / INFO))
        dcp.FileSystemReader(path).read_metadata()  # here, because `dcp.load` prints a stack trace if it cannot
    except Exception as error:  # unpickling what is damaged may raise anything
        raise Damaged.at(path) from error
    if not isinstance(info, dict) or not {f.name for f in fields(Progress)} <= info.keys():
        raise Damaged.at(path)
    return info


def read_tensors(path: Path, state: dict[str, Any], no_dist: bool = False) -> None:
    """Read into the tensors of `state`, on all ranks together (`no_dist`: on this one alone). May raise Damaged."""
    try:
        dcp.load(state, checkpoint_id=str(path), no_dist=no_dist)
    except CheckpointException as error:
        not_its_fault = MemoryError, torch.OutOfMemoryError
        if all(isinstance(e, Exception) and not isinstance(e, not_its_fault) for e in causes(error)):
            raise Damaged.at(path) from error
        raise


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a stage's directory, oldest first."""
    return sorted(p for p in directory.glob("step-*") if NAME.fullmatch(p.name))
