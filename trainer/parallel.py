"""The processes that train together: one process group, FSDP2 over all of it, and the few collectives the loop needs.

Gradients are summed over ranks: each rank's loss is already divided by the number of targets of *all* ranks, so ranks
may hold different numbers of targets. FSDP takes the mean, which is the sum once the loss is multiplied by `size`.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from dataprep.storage import UserError, explain_os_error
from trainer.config import TrainConfig
from trainer.model import Decoder, initialise
from trainer.recompute import prepare

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
TIMEOUT = timedelta(hours=6)  # ranks also wait this long for rank 0 while it waits for the packer
LOCK_SECONDS = 10.0  # a worker that Ray has killed may die while its successor starts


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    def sum(self, x: Tensor) -> Tensor:
        """The sum over ranks, in place."""
        dist.all_reduce(x)
        return x

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, a small one, on every rank. `value` is called on rank 0; its UserError is raised on all,
        and so is a full disk or a forbidden path."""
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box = [value()]
            except UserError as error:
                box = [error]
            except OSError as error:
                box = [explain_os_error(error)]
                if box[0] is None:
                    raise
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        if isinstance(box[0], UserError):
            raise box[0]
        return box[0]

    def barrier(self) -> None:
        dist.barrier()

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This rank's contiguous part of [start, stop); empty where there are fewer than ranks."""
        n = stop - start
        return start + n * self.rank // self.size, start + n * (self.rank + 1) // self.size


@contextlib.contextmanager
def world(config: TrainConfig) -> Iterator[World]:
    """Join the process group: that of torchrun or of Ray Train, or one of a single process."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch finds no GPU here; set train.device to cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    mine = not dist.is_initialized()
    if mine and "RANK" in os.environ:
        dist.init_process_group(BACKENDS[config.device], timeout=TIMEOUT)
    elif mine:
        dist.init_process_group(BACKENDS[config.device], store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    try:
        device = torch.device(config.device)
        if config.device == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            torch.cuda.set_device(device)
        mesh = init_device_mesh(config.device, (dist.get_world_size(),))
        yield World(dist.get_rank(), dist.get_world_size(), device, mesh)
    finally:
        if mine:
            dist.destroy_process_group()


@contextlib.contextmanager
def alone(directory: Path, world: World) -> Iterator[None]:
    """Make the directory this run's alone; the lock ends with rank 0's process, however that ends."""
    with contextlib.ExitStack() as held:

        def take() -> None:
            directory.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(directory / ".lock", "a"))
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise UserError(f"another run is training at {directory}; wait for it or stop it") from None
                    time.sleep(0.2)

        world.broadcast(take)
        yield


def build_model(config: TrainConfig, vocabulary: int, rope_base: float, world: World) -> Decoder:
    """The decoder, sharded over the world, with its initial weights: the same on every number of ranks."""
    wide = torch.float64 if config.dtype == "float64" else torch.float32
    with torch.device("meta"):
        model = Decoder(config.model, vocabulary, rope_base).to(wide)
    policy = MixedPrecisionPolicy()
    if config.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    prepare(model, config)
    for layer in model.layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)
    model.to_empty(device=world.device)
    initialise(model, config.seed)
    return model


def build_optimizer(config: TrainConfig, model: Decoder) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True)
