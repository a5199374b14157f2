"""Between the experts' matrix products: SwiGLU in one pass over memory, zeros behind the last row (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # columns of a program
ROWS = 64  # rows that one program clears


def swiglu(gate_up_S2F: Tensor) -> Tensor:
    """`silu(gate) * up` of [gate | up]. (S, F)."""
    rows, width = len(gate_up_S2F), gate_up_S2F.shape[1] // 2
    out = gate_up_S2F.new_empty(rows, width)
    _swiglu_kernel[(rows, triton.cdiv(width, BLOCK))](gate_up_S2F, out, width, BLOCK)
    return out


def swiglu_backward(gate_up_S2F: Tensor, grad_SF: Tensor) -> tuple[Tensor, Tensor]:
    """(gradient of [gate | up], SwiGLU once more): the next product needs both, so nothing was kept of the latter."""
    rows, width = grad_SF.shape
    d_gate_up, out = torch.empty_like(gate_up_S2F), torch.empty_like(grad_SF)
    grid = (rows, triton.cdiv(width, BLOCK))
    _swiglu_backward_kernel[grid](gate_up_S2F, grad_SF, d_gate_up, out, width, BLOCK)
    return d_gate_up, out


def clear_behind(x_SD: Tensor, count_E: Tensor) -> Tensor:
    """Zeros into the rows behind the first `count_E.sum()`, in place; the others are not touched."""
    total = count_E.sum(dtype=torch.int64)
    _clear_kernel[(triton.cdiv(len(x_SD), ROWS),)](x_SD, total, len(x_SD), x_SD.shape[1], ROWS, 128)
    return x_SD


@triton.jit
def _swiglu_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * width + i, mask=i < width).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + i, mask=i < width).to(tl.float32)
    tl.store(out + row * width + i, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=i < width)


@triton.jit
def _swiglu_backward_kernel(gate_up, grad, d_gate_up, out, width, BLOCK: tl.constexpr):
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = row * 2 * width + i
    gate = tl.load(gate_up + there, mask=i < width).to(tl.float32)
    up = tl.load(gate_up + there + width, mask=i < width).to(tl.float32)
    change = tl.load(grad + row * width + i, mask=i < width).to(tl.float32)
    opened = tl.sigmoid(gate)
    silu = gate * opened
    d_gate = change * up * opened * (1 + gate * (1 - opened))
    tl.store(d_gate_up + there, d_gate.to(d_gate_up.dtype.element_ty), mask=i < width)
    tl.store(d_gate_up + there + width, (change * silu).to(d_gate_up.dtype.element_ty), mask=i < width)
    tl.store(out + row * width + i, (silu * up).to(out.dtype.element_ty), mask=i < width)


@triton.jit
def _clear_kernel(x, total, rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    begin, first = tl.program_id(0).to(tl.int64) * ROWS, tl.load(total)
    if begin + ROWS > first:
        row = begin + tl.arange(0, ROWS)
        behind = (row >= first) & (row < rows)
        for start in range(0, width, BLOCK):
            i = start + tl.arange(0, BLOCK)
            entry = row[:, None] * width + i[None, :]
            zeros = tl.zeros((ROWS, BLOCK), x.dtype.element_ty)
            tl.store(x + entry, zeros, mask=behind[:, None] & (i < width)[None, :])
