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

    def advance(self, record: dict[str, Any], sequence: int) -> None:
        """By a step with this record, which ended before this sequence."""
        self.step, self.tokens, self.stage_tokens = record["step"], record["tokens"], record["stage_tokens"]
        self.sequence = sequence
        self.skipped += record["loss"] is None


class Writer(dcp.FileSystemWriter):
    """DCP's writer, which hashes what it has written, and commits when the files of all ranks are there."""

    def __init__(self, final: Path, info: dict[str, Any], keep: int, keep_every: int | None):
        self.temporary = final.with_name(f".tmp-{final.name}")
        super().__init__(self.temporary)
        self.final, self.info, self.keep, self.keep_every = final, info, keep, keep_every

    def write_data(self, *arguments: Any) -> Any:
        """On each rank: DCP's results, and the checksums of the files."""
        results = super().write_data(*arguments).wait()
        names = {result.storage_data.relative_path for result in results}
        both: torch.futures.Future[Any] = torch.futures.Future()
        both.set_result((results, {name: checksum(str(self.temporary / name)) for name in names}))
        return both

    def finish(self, metadata: Any, results: list[Any]) -> None:
        """On rank 0, given what `write_data` returned on each."""
        super().finish(metadata, [part for part, _ in results])
        files = {name: digest for _, part in results for name, digest in part.items()}
        files[METADATA] = checksum(str(self.temporary / METADATA))
        write_json(str(self.temporary / INFO), self.info | {"files": files})
        os.replace(self.temporary, self.final)
        there = checkpoints(self.final.parent)
        past = [c for c in there if c <= self.final]  # what is beyond was damaged
        milestones = [c for c in past if self.keep_every and int(c.name[5:]) % self.keep_every == 0]
        for old in {*there} - {*past[-self.keep :], *milestones}:
            shutil.rmtree(old)


class Saver:
    """Writes checkpoints one at a time, from a copy, in DCP's thread: training goes on meanwhile. What goes wrong there
    is raised by the next `save` or `wait`, on all ranks."""

    def __init__(self, world: World, keep: int, keep_every: int | None = None):
        self.world, self.keep, self.keep_every = world, keep, keep_every
        self.group = dist.new_group(backend="gloo")  # the thread's collectives must not mix with the training's
        self.pending: tuple[Path, Any] | None = None

    def save(
        self, directory: Path, model: Decoder, optimizer: torch.optim.Optimizer, progress: Progress,
        about: dict[str, Any],
    ) -> None:  # fmt: skip
        """Begin to write a checkpoint, once the one before it is there. `about` goes into checkpoint.json too."""
        self.wait()
        final = directory / progress.checkpoint
        if self.world.rank == 0:
            for leftover in (*directory.glob(".tmp-step-*"), final):
                shutil.rmtree(leftover, ignore_errors=True)
        self.world.barrier()
        weights, moments = get_state_dict(model, optimizer)
        writer = Writer(final, about | asdict(progress), self.keep, self.keep_every)
        state = {"model": weights, "optimizer": moments}
        self.pending = writer.temporary, dcp.async_save(state, storage_writer=writer, process_group=self.group)

    def wait(self) -> None:
        """Until the last checkpoint is committed."""
        if self.pending is not None:
            (temporary, written), self.pending = self.pending, None
            try:
                written.result()
            finally:  # nothing stays of one that failed
                shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """A full disk or a forbidden path, met while writing under `path`, as a UserError."""
    try:
        yield
    except (OSError, CheckpointException) as error:
        ranks = [e for e, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        for failure in ranks:
            number, where = getattr(failure, "errno", None), getattr(failure, "filename", None)
            if "PytorchStreamWriter" in str(failure) or "inline_container" in str(failure):
                number = errno.ENOSPC  # torch's zip writer says only that a write failed
            if mistake := explain_os_error(OSError(number, "", where or str(path))):
                raise mistake from error
        raise


def load(path: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> Progress:
    """Read weights and moments back, on any number of ranks; returns where that training was. May raise Damaged."""
    info = read_info(path)
    weights, moments = get_state_dict(model, optimizer)
    read_tensors(path, {"model": weights, "optimizer": moments})
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return Progress(**{f.name: info[f.name] for f in fields(Progress)})


def read_info(path: Path) -> dict[str, Any]:
    """What checkpoint.json says. May raise Damaged."""
    with contextlib.suppress(UserError, ValueError):
        info = read_json(str(path / INFO))
        if isinstance(info, dict) and {"files", *(f.name for f in fields(Progress))} <= info.keys():
            return info
    raise Damaged.at(path)


def read_tensors(path: Path, state: dict[str, Any], no_dist: bool = False) -> None:
    """Read into the tensors of `state`, on all ranks together (`no_dist`: on this one alone). May raise Damaged, and
    UserError where a weight has another shape there."""
    rank, size = (0, 1) if no_dist else (dist.get_rank(), dist.get_world_size())
    files = sorted(read_info(path)["files"].items())[rank::size]  # each rank compares some of them
    damaged = torch.tensor(sum(not same(path / name, digest) for name, digest in files))
    if not no_dist:
        dist.all_reduce(damaged)
    if damaged:
        raise Damaged.at(path)
    there = Reader(path).read_metadata().state_dict_metadata
    for name, weight in state["model"].items():
        if (shape := getattr(there.get(f"model.{name}"), "size", None)) != weight.shape:
            raise UserError(
                f"checkpoint {path} has {name} as {shape and tuple(shape)}, this model {tuple(weight.shape)}: another "
                "version wrote it; there, export it (python -m trainer.hf), here, train.weights starts from the export"
            )
    dcp.load(state, storage_reader=Reader(path), planner=Planner(), no_dist=no_dist)


def same(path: Path, digest: str) -> bool:
    try:
        return checksum(str(path)) == digest
    except OSError:
        return False


def checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in a stage's directory, oldest first."""
    return sorted(p for p in directory.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name))
