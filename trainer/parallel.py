"""The processes that train together: one mesh, seen three ways, FSDP2 over it, and the collectives the loop needs.

    batch:  dp (dp_replicate * dp_shard) x cp      which sequences a rank reads, which part of them it computes
    dense:  dp_replicate x fsdp (dp_shard * cp)    where all weights but the experts' lie
    expert: dp_replicate x edp (the rest of fsdp) x ep x etp
                                                   where the experts' lie: split by expert over ep, by the width F over
                                                   etp, then by the hidden size D over edp

Gradients are summed over ranks: each rank's loss is already divided by the number of targets of *all* ranks, so ranks
may hold different numbers of targets.
"""

import contextlib
import ctypes
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
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from dataprep.storage import UserError, explain_os_error
from trainer.config import TrainConfig
from trainer.model import Decoder, SoftmaxAttention, initialise
from trainer.moe import MoE
from trainer.recompute import prepare

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
TIMEOUT = timedelta(hours=6)  # ranks also wait this long for rank 0 while it waits for the packer
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LOCK_SECONDS = 10.0  # a worker that Ray has killed may die while its successor starts


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    dense: DeviceMesh
    expert: DeviceMesh
    dp: DeviceMesh
    cp: DeviceMesh | None  # None: a sequence lies on one rank

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


def keep_freed_memory() -> None:
    """glibc hands freed blocks of any size back to the system, which zeroes them when they are wanted again a moment
    later, in every layer. It keeps up to 2 GB of them, where the C library is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 32 << 20)  # the most it takes: blocks below come from the heap
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)


@contextlib.contextmanager
def world(config: TrainConfig) -> Iterator[World]:
    """Join the process group: that of torchrun or of Ray Train, or one of a single process."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch finds no GPU here; set train.device to cpu")
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.device == "cpu":
        keep_freed_memory()
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
        yield World(dist.get_rank(), dist.get_world_size(), device, *meshes(config, dist.get_world_size()))
    finally:
        if mine:
            dist.destroy_process_group()


def fsdp_ranks(config: TrainConfig, size: int) -> int:
    """Of `size` processes, those that share out one copy of the weights: dp_shard x cp. Raises UserError where the
    configured mesh does not fit so many processes."""
    mesh, m = config.parallel, config.model
    shard = mesh.dp_shard or size // (mesh.dp_replicate * mesh.cp)
    if (product := mesh.dp_replicate * shard * mesh.cp) != size:
        said = f"train.parallel: dp_replicate {mesh.dp_replicate} x dp_shard {mesh.dp_shard or shard} x cp {mesh.cp}"
        raise UserError(f"{said} is {product}, but there are {size} processes; make them equal (dp_shard 0: the rest)")
    fsdp = shard * mesh.cp
    sharing = mesh.ep * mesh.etp
    fits = [
        ("ep", mesh.ep, "train.model.experts", m.experts),
        ("etp", mesh.etp, "train.model.ffn", m.ffn),
        ("ep x etp", sharing, "dp_shard x cp", fsdp),
    ]
    if sharing > 1:  # else FSDP alone splits the experts, and may do so unevenly
        fits += [("dp_shard x cp / (ep x etp)", fsdp // sharing, "train.model.hidden", m.hidden)]
    for key, value, what, whole in fits:
        if whole % value:
            raise UserError(f"train.parallel: {key} is {value}; it must divide {what}, which is {whole}")
    return fsdp


def meshes(config: TrainConfig, size: int) -> tuple[DeviceMesh, DeviceMesh, DeviceMesh, DeviceMesh | None]:
    """`dense`, `expert`, `dp`, `cp`. Raises UserError where the configured mesh does not fit so many processes."""
    mesh, fsdp = config.parallel, fsdp_ranks(config, size)
    root = init_device_mesh(config.device, (size,), mesh_dim_names=("world",))
    batch = root._unflatten(0, (size // mesh.cp, mesh.cp), ("dp", "cp"))
    dense = root._unflatten(0, (mesh.dp_replicate, fsdp), ("dp_replicate", "fsdp"))
    sizes = mesh.dp_replicate, fsdp // (mesh.ep * mesh.etp), mesh.ep, mesh.etp
    expert = root._unflatten(0, sizes, ("dp_replicate", "edp", "ep", "etp"))
    return dense, expert, batch["dp"], batch["cp"] if mesh.cp > 1 else None


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
    """The decoder, sharded over the world, with its initial weights: the same on every mesh."""
    wide = torch.float64 if config.dtype == "float64" else torch.float32
    with torch.device("meta"):
        model = Decoder(config.model, vocabulary, rope_base).to(wide)
    prepare(model, config)
    shard(model, config, world)
    model.to_empty(device=world.device)
    initialise(model, config.seed)
    return model


def shard(model: Decoder, config: TrainConfig, world: World) -> None:
    """FSDP2 layer by layer (HSDP with copies); the experts apart where expert parallelism splits them first.

    One process that computes in its weights' own type has nothing to shard or cast, and FSDP would copy every weight.
    """
    if world.size == 1 and config.dtype != "bfloat16":
        return
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    gate = policy
    if config.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    copies = config.parallel.dp_replicate > 1
    dense = world.dense if copies else world.dense["fsdp"]
    for layer in model.layers:
        attention, moe = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
        assert isinstance(moe, MoE)
        if isinstance(attention, SoftmaxAttention):
            attention.ring = config.parallel.cp_attention == "ring"
        moe.peers = world.dense["fsdp"]
        if config.parallel.ep * config.parallel.etp > 1:
            holders = world.expert["ep", "etp"]
            moe.ep, moe.etp = holders._flatten(), config.parallel.etp
            for name, p in list(moe.experts.named_parameters()):  # (E, 2, F, D) and (E, D, F)
                split = distribute_tensor(p.detach(), holders, [Shard(0), Shard(2)], src_data_rank=None)
                moe.experts.register_parameter(name, nn.Parameter(split))
            edp = world.expert["dp_replicate", "edp"] if copies else world.expert["edp"]
            fully_shard(
                moe.experts, mesh=edp, mp_policy=policy, shard_placement_fn=lambda p: Shard(3 if p.ndim == 4 else 1)
            )
        if gate != policy:
            fully_shard(moe.gate, mesh=dense, mp_policy=gate)  # its weights stay float32
        fully_shard(layer, mesh=dense, mp_policy=policy)
    fully_shard(model, mesh=dense, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the sum, not the mean
            module.set_force_sum_reduction_for_comms(True)


def build_optimizer(config: TrainConfig, model: Decoder) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.optimizer.betas, eps=config.optimizer.eps, fused=True)
