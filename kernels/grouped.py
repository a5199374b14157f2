"""Matrix products of rows sorted by expert, each expert with its own matrix: one operator with one graph everywhere.

Shape suffixes: S rows, E experts, O rows of a matrix, I its columns, F the experts' FFN, A experts per token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import fused


@torch.library.custom_op("trivium::grouped_linear", mutates_args=())
def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, count_E: Tensor) -> Tensor:
    """`x @ weight[e].T` for the `count_E[e]` rows of expert e, in order; zero for the rows beyond. (S, O)."""
    if has_grouped_mm(x_SI):
        from kernels.experts import clear_behind

        out_SO = torch._grouped_mm(x_SI, weight_EOI.mT, offs=count_E.cumsum(0, dtype=torch.int32))
        return clear_behind(out_SO, count_E)  # it leaves those rows uninitialised
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
    if has_grouped_mm(x_SI):
        return torch._grouped_mm(y_SO.mT, x_SI, offs=count_E.cumsum(0, dtype=torch.int32))
    out_EOI = x_SI.new_empty(len(count_E), y_SO.shape[1], x_SI.shape[1])
    start = 0
    for out_OI, count in zip(out_EOI, count_E.tolist(), strict=True):
        rows = slice(start, start := start + count)
        torch.mm(y_SO[rows].T, x_SI[rows], out=out_OI)
    return out_EOI


def has_grouped_mm(x: Tensor) -> bool:
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


def swiglu_linear(gate_up_S2F: Tensor, weight_EOF: Tensor, count_E: Tensor) -> Tensor:
    """`grouped_linear` of `silu(gate) * up`, which on a GPU is computed again instead of kept. (S, O)."""
    if fused.on_gpu(gate_up_S2F):
        return torch.ops.trivium.swiglu_linear(gate_up_S2F, weight_EOF, count_E)
    gate_SF, up_SF = gate_up_S2F.chunk(2, dim=-1)
    return grouped_linear(F.silu(gate_SF) * up_SF, weight_EOF, count_E)


@torch.library.custom_op("trivium::swiglu_linear", mutates_args=())
def _swiglu_linear(gate_up_S2F: Tensor, weight_EOF: Tensor, count_E: Tensor) -> Tensor:
    from kernels.experts import swiglu

    return grouped_linear(swiglu(gate_up_S2F), weight_EOF, count_E)


@torch.library.custom_op("trivium::swiglu_linear_backward", mutates_args=())
def _swiglu_linear_backward(
    grad_SO: Tensor, gate_up_S2F: Tensor, weight_EOF: Tensor, count_E: Tensor
) -> tuple[Tensor, Tensor]:
    from kernels.experts import swiglu_backward

    grad_SO = grad_SO.contiguous()
    d_gate_up_S2F, h_SF = swiglu_backward(gate_up_S2F, grouped_linear(grad_SO, weight_EOF.mT, count_E))
    return d_gate_up_S2F, grouped_outer(grad_SO, h_SF, count_E)


@_swiglu_linear.register_fake
def _(gate_up_S2F: Tensor, weight_EOF: Tensor, count_E: Tensor) -> Tensor:
    return gate_up_S2F.new_empty(gate_up_S2F.shape[0], weight_EOF.shape[1])


@_swiglu_linear_backward.register_fake
def _(grad_SO: Tensor, gate_up_S2F: Tensor, weight_EOF: Tensor, count_E: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up_S2F), weight_EOF.new_empty(weight_EOF.shape)


_swiglu_linear.register_autograd(
    lambda ctx, grad: (*torch.ops.trivium.swiglu_linear_backward(grad, *ctx.saved_tensors), None), setup_context=_save
)
