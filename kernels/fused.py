"""The parts of a layer that memory bounds: one pass of our kernels on a GPU, plain PyTorch elsewhere."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def on_gpu(x: Tensor) -> bool:
    """Whether our kernels compute this."""
    return x.is_cuda and x.dtype != torch.float64


def gated_norm(x_TX: Tensor, gate_TX: Tensor, weight_X: Tensor, eps: float) -> Tensor:
    """`rms_norm(x, weight) * sigmoid(gate)`: the end of a lightning layer."""
    if on_gpu(x_TX):
        from kernels import gated_norm as kernel

        return kernel.gated_norm(x_TX, gate_TX, weight_X, eps)
    return F.rms_norm(x_TX, weight_X.shape, weight_X, eps) * gate_TX.sigmoid()


def rotate_both(q_THN: Tensor, k_TKN: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the first 2r of their N dimensions rotated, half-split: dimension i pairs with i + r."""
    if on_gpu(q_THN) and cos_T1r.shape[-1]:
        from kernels import rotary as kernel

        return kernel.rotate(q_THN, k_TKN, cos_T1r, sin_T1r)
    return rotate(q_THN, cos_T1r, sin_T1r), rotate(k_TKN, cos_T1r, sin_T1r)


def rotate(x_THN: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> Tensor:
    """`rotate_both` for one of them."""
    half = cos_T1r.shape[-1]
    a, b, rest = x_THN.split([half, half, x_THN.shape[-1] - 2 * half], dim=-1)
    turned = a * cos_T1r - b * sin_T1r, b * cos_T1r + a * sin_T1r
    return torch.cat([*(x.to(rest.dtype) for x in turned), rest], dim=-1)


def sorted_by(kind_S: Tensor, kinds: int) -> tuple[Tensor, Tensor, Tensor]:
    """The stable order of numbers in [0, kinds), its inverse, and how many there are of each."""
    if on_gpu(kind_S):
        from kernels import permute as kernel

        return kernel.sorted_by(kind_S, kinds)
    order_S = kind_S.argsort(stable=True)
    return order_S, inverted(order_S), tally(kind_S, kinds)


def inverted(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def tally(index: Tensor, size: int) -> Tensor:
    """How often each number below `size` occurs; `size` itself is not counted. `bincount` would wait for the GPU."""
    return index.new_zeros(size + 1).scatter_add_(0, index.flatten(), torch.ones_like(index).flatten())[:size]


def spread(x_TD: Tensor, order_S: Tensor, inverse_S: Tensor) -> Tensor:
    """Every token's row, as often as it has experts, in the order of the experts. (S, D)."""
    copies = len(order_S) // len(x_TD) if len(x_TD) else 1  # a rank may be sent no row
    if on_gpu(x_TD):
        from kernels import permute as kernel

        return kernel.spread(x_TD, inverse_S.view(-1, copies))
    return Permute.apply(x_TD, order_S, inverse_S, copies)


def combine(y_SD: Tensor, weight_TA: Tensor, order_S: Tensor, inverse_S: Tensor) -> Tensor:
    """The sum of every token's rows with these weights. (T, D)."""
    if on_gpu(y_SD):
        from kernels import permute as kernel

        return kernel.combine(y_SD, inverse_S.view_as(weight_TA), weight_TA)
    y_TAD = Permute.apply(y_SD, inverse_S, order_S).unflatten(0, (-1, weight_TA.shape[1]))
    return (y_TAD * weight_TA.to(y_SD.dtype)[:, :, None]).sum(1)


class Permute(torch.autograd.Function):
    """Rows, each `copies` times, in another order. Its gradient is a gather too: quicker than a scatter-add, and always
    the same bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int = 1) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, order // copies)  # `x[order // copies]` takes several times as long on the CPU

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grad.index_select(0, ctx.saved_tensors[0])
        return grad.unflatten(0, (-1, ctx.copies)).sum(1) if ctx.copies > 1 else grad, None, None, None
