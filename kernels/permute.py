"""Tokens to their experts' rows and back, and these rows' order: one pass over memory each, no atomics (Triton).

A token has A rows, and `place_TA` (all of 0..T*A-1) says which. `spread` copies it to them, `combine` adds them up;
each is the other's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTED = 8192  # entries of the table of ones in which a program of the sort counts


def spread(x_TD: Tensor, place_TA: Tensor) -> Tensor:
    """`out[place[t, a]] = x[t]`. (T * A, D)."""
    return torch.ops.trivium.spread(x_TD, place_TA)


def combine(y_SD: Tensor, place_TA: Tensor, weight_TA: Tensor | None = None) -> Tensor:
    """`out[t] = sum over a of weight[t, a] * y[place[t, a]]` (no weight: 1), summed in float32. (T, D)."""
    return torch.ops.trivium.combine(y_SD, place_TA, weight_TA)


def sorted_by(kind_S: Tensor, kinds: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable counting sort of numbers in [0, kinds): (order, its inverse, how many there are of each), all int64."""
    rows, columns = len(kind_S), triton.next_power_of_2(kinds)
    block = max(16, COUNTED // columns)
    blocks = triton.cdiv(rows, block)
    count = torch.empty(kinds, blocks, dtype=torch.int64, device=kind_S.device)
    _count_kernel[(blocks,)](kind_S, count, rows, kinds, blocks, block, columns)
    before = (count.flatten().cumsum(0) - count.flatten()).view_as(count)
    order, place = torch.empty_like(kind_S), torch.empty_like(kind_S)
    _place_kernel[(blocks,)](kind_S, before, order, place, rows, kinds, blocks, block, columns)
    return order, place, count.sum(1)


@torch.library.custom_op("trivium::spread", mutates_args=())
def _spread(x: Tensor, place: Tensor) -> Tensor:
    out = x.new_empty(place.numel(), x.shape[1])
    _run(_spread_kernel, place, x.shape[1], x.contiguous(), out, out, place.contiguous(), out, out, False)
    return out


@torch.library.custom_op("trivium::combine", mutates_args=())
def _combine(y: Tensor, place: Tensor, weight: Tensor | None) -> Tensor:
    out = y.new_empty(len(place), y.shape[1])
    scale = out if weight is None else weight.contiguous()
    _run(_combine_kernel, place, y.shape[1], y.contiguous(), out, place.contiguous(), scale, weight is not None)
    return out


@torch.library.custom_op("trivium::combine_backward", mutates_args=())
def _combine_backward(grad: Tensor, y: Tensor, place: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of their weights."""
    dy, d_weight = torch.empty_like(y, memory_format=torch.contiguous_format), torch.empty_like(weight)
    rows = grad.contiguous(), y.contiguous(), dy, place.contiguous(), weight.contiguous(), d_weight
    _run(_spread_kernel, place, y.shape[1], *rows, True)
    return dy, d_weight


def _run(kernel, place: Tensor, width: int, *arguments) -> None:
    """A program for each token, which holds a whole row."""
    block = triton.next_power_of_2(width)
    kernel[(len(place),)](*arguments, width, place.shape[1], block, num_warps=min(16, max(1, block // 256)))


@_spread.register_fake
def _(x, place):
    return x.new_empty(place.numel(), x.shape[1])


@_combine.register_fake
def _(y, place, weight):
    return y.new_empty(len(place), y.shape[1])


@_combine_backward.register_fake
def _(grad, y, place, weight):
    return torch.empty_like(y, memory_format=torch.contiguous_format), torch.empty_like(weight)


_spread.register_autograd(
    lambda ctx, grad: (torch.ops.trivium.combine(grad, *ctx.saved_tensors, None), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)


def _differentiate(ctx, grad: Tensor):
    y, place, weight = ctx.saved_tensors
    if weight is None:
        return torch.ops.trivium.spread(grad, place), None, None
    dy, d_weight = torch.ops.trivium.combine_backward(grad, y, place, weight)
    return dy, None, d_weight


_combine.register_autograd(
    _differentiate,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(
        inputs[0] if inputs[2] is not None else None, *inputs[1:]
    ),
)


@triton.jit
def _spread_kernel(
    x, y, out, place, weight, dots, WEIGHTED: tl.constexpr, width, A: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A token to its rows. Weighted: times each row's weight; and the token's product with that row of y."""
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + token * width + i, mask=i < width, other=0.0)
    for a in tl.static_range(A):
        row = tl.load(place + token * A + a) * width + i
        if WEIGHTED:
            wide = value.to(tl.float32)
            other = tl.load(y + row, mask=i < width, other=0.0).to(tl.float32)
            tl.store(dots + token * A + a, tl.sum(wide * other).to(dots.dtype.element_ty))
            wide *= tl.load(weight + token * A + a).to(tl.float32)
            tl.store(out + row, wide.to(out.dtype.element_ty), mask=i < width)
        else:
            tl.store(out + row, value, mask=i < width)


@triton.jit
def _combine_kernel(
    y, out, place, weight, WEIGHTED: tl.constexpr, width, A: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for a in tl.static_range(A):
        row = tl.load(place + token * A + a) * width + i
        value = tl.load(y + row, mask=i < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + token * A + a).to(tl.float32)
        total += value
    tl.store(out + token * width + i, total.to(out.dtype.element_ty), mask=i < width)


@triton.jit
def _ones(kind, begin, rows, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """(BLOCK, COLUMNS): 1 where the row's kind is the column."""
    i = begin + tl.arange(0, BLOCK)
    mine = tl.load(kind + i, mask=i < rows, other=COLUMNS)
    return (mine[:, None] == tl.arange(0, COLUMNS)[None, :]).to(tl.int32)


@triton.jit
def _count_kernel(kind, count, rows, kinds, blocks, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    block, column = tl.program_id(0), tl.arange(0, COLUMNS)
    found = tl.sum(_ones(kind, block * BLOCK, rows, BLOCK, COLUMNS), 0)
    tl.store(count + column * blocks + block, found.to(tl.int64), mask=column < kinds)


@triton.jit
def _place_kernel(kind, before, order, place, rows, kinds, blocks, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """`before`: how many rows come before the first of each kind and block."""
    block, column = tl.program_id(0), tl.arange(0, COLUMNS)
    i = block * BLOCK + tl.arange(0, BLOCK)
    ones = _ones(kind, block * BLOCK, rows, BLOCK, COLUMNS)
    first = tl.load(before + column * blocks + block, mask=column < kinds, other=0)
    where = tl.sum(ones * (first[None, :] + tl.cumsum(ones, 0) - 1), 1)
    tl.store(place + i, where, mask=i < rows)
    tl.store(order + where, i.to(tl.int64), mask=i < rows)
