"""Matrix products of rows sorted by expert, each expert with its own matrix: one operator with one graph everywhere."""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("trivium::grouped_linear", mutates_args=())
def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """`x @ weight[e].T` for the `count_E[e]` rows of expert e, in order; zero for the rows beyond. (S, O)."""
    if fused(x_SI):
        offset_E = count_E.cumsum(0, dtype=torch.int32)
        out_SO = torch._grouped_mm(x_SI, weight_EOI.mT, offs=offset_E)
        beyond_S = torch.arange(len(x_SI), device=x_SI.device) >= offset_E[-1]
        return out_SO.masked_fill_(beyond_S[:, None], 0)  # it leaves those rows uninitialised
    out_SO = x_SI.new_empty(len(x_SI), weight_EOI.shape[1])
    start = 0
    for weight_OI, count in zip(weight_EOI, count_E.tolist(), strict=True):
        rows = slice(start, start := start + count)
        torch.mm(x_SI[rows], weight_OI.T, out=out_SO[rows])
    out_SO[start:] = 0
    return out_SO


@torch.library.custom_op("trivium::grouped_outer", mutates_args=())
def grouped_outer(y_SO: Tensor, x_SI: Tensor, count_E: Tensor) -> Tensor:
    """`y.T @ x` of each expert's rows: the gradient of its matrix. (E, O, I)."""
    if fused(x_SI):
        return torch._grouped_mm(y_SO.mT, x_SI, offs=count_E.cumsum(0, dtype=torch.int32))
    out_EOI = x_SI.new_empty(len(count_E), y_SO.shape[1], x_SI.shape[1])
    start = 0
    for out_OI, count in zip(out_EOI, count_E.tolist(), strict=True):
        rows = slice(start, start := start + count)
        torch.mm(y_SO[rows].T, x_SI[rows], out=out_OI)
    return out_EOI


def fused(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16


@grouped_linear.register_fake
def _(x_SI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    return x_SI.new_empty(x_SI.shape[0], weight_EOI.shape[1])


@grouped_outer.register_fake
def _(y_SO: Tensor, x_SI: Tensor, count_E: Tensor) -> Tensor:
    return x_SI.new_empty(count_E.shape[0], y_SO.shape[1], x_SI.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_SO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_SI, weight_EOI, count_E = ctx.saved_tensors
    grad_SO = grad_SO.contiguous()
    return grouped_linear(grad_SO, weight_EOI.mT, count_E), grouped_outer(grad_SO, x_SI, count_E), None


grouped_linear.register_autograd(_backward, setup_context=_save)
