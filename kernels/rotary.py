"""Partial rotary embedding of queries and keys in one kernel, and its inverse as the gradient (Triton)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 16  # of one program, which turns one head of them


def rotate(q_THN: Tensor, k_TKN: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the first 2r of their N dimensions rotated, half-split: dimension i pairs with i + r (0 < r)."""
    return torch.ops.trivium.rotate(q_THN, k_TKN, cos_T1r, sin_T1r, False)


@torch.library.custom_op("trivium::rotate", mutates_args=())
def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """back: by the angles' negatives."""
    q, k = q.contiguous(), k.contiguous()
    turned = torch.empty_like(q), torch.empty_like(k)
    tokens, heads, size = q.shape
    half = cos.shape[-1]
    _rotate_kernel[(triton.cdiv(tokens, TOKENS), heads + k.shape[1])](
        q, k, *turned, cos.contiguous(), sin.contiguous(), tokens, heads, k.shape[1],
        size, half, triton.next_power_of_2(half), triton.next_power_of_2(max(1, size - 2 * half)), TOKENS, back,
        num_warps=4,
    )  # fmt: skip
    return turned


@_rotate.register_fake
def _(q, k, cos, sin, back):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[2:4])
    ctx.back = inputs[4]


def _differentiate(ctx, dq: Tensor, dk: Tensor):
    return *torch.ops.trivium.rotate(dq, dk, *ctx.saved_tensors, not ctx.back), None, None, None


_rotate.register_autograd(_differentiate, setup_context=_save)


@triton.jit
def _rotate_kernel(
    q, k, q_out, k_out, cos, sin, tokens, heads, key_heads,
    N: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    """TURNED and REST: HALF and N - 2 HALF, rounded up to a power of two."""
    head = tl.program_id(1)
    if head < heads:
        _turn(q, q_out, cos, sin, tokens, head, heads, N, HALF, TURNED, REST, TOKENS, BACK)
    else:
        _turn(k, k_out, cos, sin, tokens, head - heads, key_heads, N, HALF, TURNED, REST, TOKENS, BACK)


@triton.jit
def _turn(
    x, out, cos, sin, tokens, head, heads,
    N: tl.constexpr, HALF: tl.constexpr, TURNED: tl.constexpr, REST: tl.constexpr, TOKENS: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None]
    rows = (token * heads + head) * N
    i = tl.arange(0, TURNED)[None, :]
    mask = (token < tokens) & (i < HALF)
    c = tl.load(cos + token * HALF + i, mask=mask, other=0.0)
    s = tl.load(sin + token * HALF + i, mask=mask, other=0.0)
    if BACK:
        s = -s
    a = tl.load(x + rows + i, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + rows + HALF + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows + i, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + rows + HALF + i, (b * c + a * s).to(out.dtype.element_ty), mask=mask)
    i = tl.arange(0, REST)[None, :]
    mask = (token < tokens) & (i < N - 2 * HALF)
    tl.store(out + rows + 2 * HALF + i, tl.load(x + rows + 2 * HALF + i, mask=mask, other=0.0), mask=mask)
