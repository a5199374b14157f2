"""The end of a lightning layer in one pass over memory, and its gradients: RMSNorm times a sigmoid gate (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 1024  # programs of the backward pass, each with its own sum for the weight: no atomics, always the same bits


def gated_norm(x_TX: Tensor, gate_TX: Tensor, weight_X: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight * sigmoid(gate)` row by row, computed in float32. (T, X), as x."""
    return torch.ops.trivium.gated_norm(x_TX, gate_TX, weight_X, eps)


@torch.library.custom_op("trivium::gated_norm", mutates_args=())
def _forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, gate = x.contiguous(), gate.contiguous()
    out = torch.empty_like(x)
    block, warps = shape(x.shape[1])
    _forward_kernel[(len(x),)](x, gate, weight, out, x.shape[1], eps, block, num_warps=warps)
    return out


@_forward.register_fake
def _(x, gate, weight, eps):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("trivium::gated_norm_backward", mutates_args=())
def _backward(grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, gate = grad.contiguous(), x.contiguous(), gate.contiguous()
    dx, d_gate = torch.empty_like(x), torch.empty_like(gate)
    parts = min(PARTS, len(x))
    sums = torch.empty(parts, x.shape[1], dtype=torch.float32, device=x.device)
    block, warps = shape(x.shape[1])
    _backward_kernel[(parts,)](
        grad, x, gate, weight, dx, d_gate, sums, len(x), parts, x.shape[1], eps, block, num_warps=warps
    )
    return dx, d_gate, sums.sum(0).to(weight.dtype)


@_backward.register_fake
def _(grad, x, gate, weight, eps):
    dx, d_gate = (torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, gate))
    return dx, d_gate, torch.empty_like(weight)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, grad: Tensor):
    return *torch.ops.trivium.gated_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None


_forward.register_autograd(_differentiate, setup_context=_save)


def shape(width: int) -> tuple[int, int]:
    """(block, warps) of a program that holds a whole row: 16 bytes of bfloat16 per thread, up to 16 warps."""
    block = triton.next_power_of_2(width)
    return block, min(16, max(1, block // 256))


@triton.jit
def _forward_kernel(x, gate, weight, out, width, eps, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64) * width + i
    value = tl.load(x + row, mask=i < width, other=0.0).to(tl.float32)
    opened = tl.sigmoid(tl.load(gate + row, mask=i < width, other=0.0).to(tl.float32))
    scale = tl.load(weight + i, mask=i < width, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value) / width + eps)
    tl.store(out + row, (value * inverse * scale * opened).to(out.dtype.element_ty), mask=i < width)


@triton.jit
def _backward_kernel(
    grad, x, gate, weight, dx, d_gate, sums, rows, parts, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """Every `parts`-th row; what they add to the weight's gradient goes into this program's row of `sums`."""
    i = tl.arange(0, BLOCK)
    scale = tl.load(weight + i, mask=i < width, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(tl.program_id(0), rows, parts):
        row = tl.cast(number, tl.int64) * width + i
        value = tl.load(x + row, mask=i < width, other=0.0).to(tl.float32)
        opened = tl.sigmoid(tl.load(gate + row, mask=i < width, other=0.0).to(tl.float32))
        change = tl.load(grad + row, mask=i < width, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value) / width + eps)
        normed = value * inverse
        total += change * opened * normed
        d_opened = change * normed * scale
        tl.store(d_gate + row, (d_opened * opened * (1 - opened)).to(d_gate.dtype.element_ty), mask=i < width)
        d_normed = change * opened * scale
        d_value = inverse * (d_normed - normed * (tl.sum(d_normed * normed) / width))
        tl.store(dx + row, d_value.to(dx.dtype.element_ty), mask=i < width)
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + i, total, mask=i < width)
