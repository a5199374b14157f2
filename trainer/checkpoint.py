"""Checkpoints: torch DCP for weights and moments (any number of ranks reads them back), `checkpoint.json` for the rest.

A checkpoint is written beside the training, under a temporary name, and becomes `step-NNNNNNNN` by one rename: one that
exists was whole. `checkpoint.json` has a checksum of every file, compared before anything is loaded.
"""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from dataprep.storage import UserError, checksum, explain_os_error, read_json, write_json
from trainer.model import Decoder
from trainer.parallel import World
from trainer.untrusted import Planner, Reader

NAME = re.compile(r"step-\d{8}")
INFO = "checkpoint.json"
METADATA = ".metadata"


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
    skipped: int = 0  # steps of this stage whose loss or gradient was not finite

    @property
    def checkpoint(self) -> str:
        return f"step-{self.step:08d}"


class Saver:
    """Writes checkpoints one at a time, from a copy, in a thread of its own: training goes on meanwhile.

    What goes wrong there is raised by the next `save` or `wait`, on all ranks: UserError where the disk is full.
    """

    def __init__(self, world: World, keep: int, keep_every: int | None = None):
        self.world, self.keep, self.keep_every = world, keep, keep_every
        self.group = dist.new_group(backend="gloo")  # the thread's collectives must not mix with the training's
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.pending: tuple[Path, Future[None]] | None = None

    def save(
        self,
        directory: Path,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        about: dict[str, Any],
    ) -> None:
        """Begin to write a checkpoint, once the one before it is there. `about` goes into checkpoint.json too."""
        self.wait()
        final = directory / progress.checkpoint
        temporary = directory / f".tmp-{final.name}"
        if self.world.rank == 0:
            for leftover in (*directory.glob(".tmp-step-*"), final):
                shutil.rmtree(leftover, ignore_errors=True)
        self.world.barrier()
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        written = dcp.async_save(state, checkpoint_id=str(temporary), process_group=self.group)
        info = about | asdict(progress)
        self.pending = final, self.thread.submit(self._commit, written, temporary, final, info)

    def wait(self) -> None:
        """Until the last checkpoint is committed."""
        if self.pending is None:
            return
        (final, done), self.pending = self.pending, None
        with explained(final):
            failure = done.exception()
            if isinstance(failure, CheckpointException):  # told to all ranks already
                raise failure
            self.world.broadcast(done.result)  # rank 0 alone may have failed to commit

    def close(self) -> None:
        """End without an error: for when there is one already."""
        if self.pending is not None:
            self.pending[1].exception()
        self.thread.shutdown()

    def _commit(self, written: Any, temporary: Path, final: Path, info: dict[str, Any]) -> None:
        try:
            written.result()
            mine = {file.name: checksum(str(file)) for file in temporary.glob(f"__{self.world.rank}_*")}
            parts: list[Any] = [None] * self.world.size
            dist.gather_object(mine, parts if self.world.rank == 0 else None, group=self.group)
            if self.world.rank:
                return
            files = {name: digest for part in parts for name, digest in part.items()}
            files[METADATA] = checksum(str(temporary / METADATA))
            write_json(str(temporary / INFO), info | {"files": files})
            os.replace(temporary, final)
            self._prune(final)
        finally:
            if self.world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self, final: Path) -> None:
        """Remove all but the last `keep` and the milestones; what is beyond `final` was damaged."""
        there = checkpoints(final.parent)
        kept = {c for c in there if c <= final and self.keep_every and step_of(c) % self.keep_every == 0}
        kept.update([c for c in there if c <= final][-self.keep :])
        for old in set(there) - kept:
            shutil.rmtree(old)


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


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def read_info(path: Path) -> dict[str, Any]:
    """What checkpoint.json says. Raises Damaged where it, or DCP's own `.metadata`, cannot be read."""
    try:
        info = read_json(str(path / INFO))
        Reader(path).read_metadata()  # here, because `dcp.load` prints a stack trace if it cannot
    except Exception as error:  # unpickling what is damaged may raise anything
        raise Damaged.at(path) from error
    if not isinstance(info, dict) or not {"files", *(f.name for f in fields(Progress))} <= info.keys():
        raise Damaged.at(path)
    return info


def read_tensors(path: Path, state: dict[str, Any], no_dist: bool = False) -> None:
    """Read into the tensors of `state`, on all ranks together (`no_dist`: on this one alone). May raise Damaged."""
    if not whole(path, no_dist):
        raise Damaged.at(path)
    try:
        dcp.load(state, storage_reader=Reader(path), planner=Planner(), no_dist=no_dist)
    except CheckpointException as error:
        not_its_fault = MemoryError, torch.OutOfMemoryError
        if all(isinstance(e, Exception) and not isinstance(e, not_its_fault) for e in causes(error)):
            raise Damaged.at(path) from error
        raise


def whole(path: Path, no_dist: bool) -> bool:
    """Whether the files are those that checkpoint.json names; each rank compares some of them."""
    rank, size = (0, 1) if no_dist else (dist.get_rank(), dist.get_world_size())
    files = sorted(read_info(path)["files"].items())[rank::size]
    try:
        damaged = torch.tensor(sum(checksum(str(path / name)) != digest for name, digest in files))
    except OSError:
        damaged = torch.tensor(1)
    if not no_dist:
        dist.all_reduce(damaged)
    return not damaged


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a stage's directory, oldest first."""
    return sorted(p for p in directory.glob("step-*") if NAME.fullmatch(p.name))
