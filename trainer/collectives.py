"""The differentiable collectives, and the norm of gradients that lie on several meshes."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

# torch 2.13 renamed them
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class AllGather(torch.autograd.Function):
    """Equal parts of all ranks, end to end along dimension 0. Its gradient: the sum over ranks, each its own part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        part = grad.new_empty(len(grad) // ctx.group.size(), *grad.shape[1:])
        _reduce_scatter(part, grad.contiguous(), group=ctx.group)
        return part, None


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(group.size() * len(x), *x.shape[1:])
    _gather(out, x.contiguous(), group=group)
    return out


class AllToAll(torch.autograd.Function):
    """`send[r]` rows to rank r, `receive[r]` from it, in order of rank. Its gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        out = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), receive, send, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return AllToAll.apply(grad, ctx.receive, ctx.send, ctx.group), None, None, None


@torch.no_grad()
def clip_gradients(parameters: Iterable[torch.nn.Parameter], largest: float) -> Tensor:
    """Scale all gradients so that their norm is at most `largest`; returns the norm before, the same on every rank.

    torch's own raises where parameters lie on different meshes. Here each rank takes its own parts' squares, divided by
    the number of ranks that hold the same part, and one sum over the world makes the norm.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    held = [copies(g) for g in gradients]
    norms = torch.stack(torch._foreach_norm(parts)).double()
    total = (norms.square() / torch.tensor(held, dtype=norms.dtype, device=norms.device)).sum()
    if dist.is_initialized():
        dist.all_reduce(total)
    norm = total.sqrt()
    torch._foreach_mul_(parts, (largest / (norm + 1e-6)).clamp(max=1.0).to(parts[0].dtype))
    return norm


def copies(x: Tensor) -> int:
    """How many ranks hold the same part of it."""
    if not isinstance(x, DTensor):
        return dist.get_world_size() if dist.is_initialized() else 1
    shards = 1
    for size, placement in zip(x.device_mesh.shape, x.placements, strict=True):
        shards *= 1 if placement.is_replicate() else size
    return dist.get_world_size() // shards
