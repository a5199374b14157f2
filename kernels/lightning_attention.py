"""Lightning attention over packed documents on the GPU (Triton): forward, backward, state in and state out.

`S_t = exp(-s) S_{t-1} + k_t v_t^T`, `o_t = q_t^T S_t` (arXiv 2501.08313, section 2.2.2; scale 1), S = 0 where a
document starts. Documents are cut into segments and those into chunks. Three passes, each parallel over segments:

    local   what each segment adds to the state                     (matrix products, states held in registers)
    scan    the state that comes into each segment                  (a few bytes per token)
    output  chunk by chunk from that state on                       (matrix products)

The gradients are attention too: of (do, v, k) for q, and from the end of each document on of (v, do, q) for k and of
(k, q, do) for v. So two kernels and a scan do everything. Documents of one segment, which most are, need only the last.
Every decay is exp of a number that is 0 or less, so nothing overflows on partial chunks. States are float32.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64  # tokens of one masked matrix product
SEGMENT = 512  # tokens that one program goes through in order
WIDTH = 64  # columns of the state that one program of a matrix product holds
WARPS, STAGES = 4, 2  # of such a program
HEAD_SIZES = (16, 32, 64, 128)
SCAN_TILE = 1024  # entries of the state that one program of the scan carries


@dataclass(frozen=True)
class Segments:
    """Where the documents of a packed stream lie, as the kernels read it: made once per batch, used by every layer.

    A document of several segments, and the first and the last of the stream, have a *scan*: consecutive states, one
    before each segment and one after the last.
    """

    table: Tensor  # int32 (segments, 3): first token, one past the last, the scan's state before it or -1
    scans: Tensor  # int32 (scans, 3): its first state, its segments, the number of the first of them
    states: int
    tokens: int  # in all documents: what follows is padding

    @classmethod
    def of(cls, cu_seqlens: list[int], device: torch.device | str = "cpu") -> "Segments":
        """cu_seqlens: document i is tokens [cu_seqlens[i], cu_seqlens[i + 1]), none of them empty."""
        table: list[tuple[int, int, int]] = []
        scans: list[tuple[int, int, int]] = []
        states = 0
        for document, (start, stop) in enumerate(pairwise(cu_seqlens)):
            begins = range(start, stop, SEGMENT)
            scanned = len(begins) > 1 or document in (0, len(cu_seqlens) - 2)
            if scanned:
                scans.append((states, len(begins), len(table)))
            for number, begin in enumerate(begins):
                table.append((begin, min(begin + SEGMENT, stop), states + number if scanned else -1))
            states += (len(begins) + 1) * scanned
        segments, scanned_documents = (torch.tensor(rows, dtype=torch.int32).view(-1, 3) for rows in (table, scans))
        return cls(segments.to(device), scanned_documents.to(device), states, cu_seqlens[-1])


def lightning_attention(
    qkv_THX: Tensor, slope_H: Tensor, segments: Segments, initial_HNN: Tensor | None = None, silu: bool = False
) -> tuple[Tensor, Tensor]:
    """(output (T, H, N), state after the last document (H, N, N) in float32), both with gradients.

    qkv_THX: (T, H, 3N), of each head its q, k and v, the last dimension contiguous; N is 64 or 128 (or smaller powers
    of two from 16); float32, bfloat16 or float16. silu: whether SiLU is to be applied to it on the way. slope_H:
    float32, decay per token, 0 or more. initial_HNN: float32, the state that comes into the first document.
    """
    return torch.ops.trivium.lightning_attention(
        qkv_THX, slope_H, segments.table, segments.scans, segments.states, segments.tokens, initial_HNN, silu
    )


@torch.library.custom_op("trivium::lightning_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    slope: Tensor,
    table: Tensor,
    scans: Tensor,
    states: int,
    tokens: int,
    initial: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = _parts(qkv)
    state = _states(k, v, slope, table, scans, states, initial, silu)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    out[tokens:] = 0
    _attend(q, k, v, out, state, slope, table, silu=(silu, silu, silu))
    return out, state[-1].clone()


@_forward.register_fake
def _(qkv, slope, table, scans, states, tokens, initial, silu):
    heads, size = qkv.shape[1], qkv.shape[2] // 3
    return qkv.new_empty(len(qkv), heads, size), slope.new_empty(heads, size, size)


@torch.library.custom_op("trivium::lightning_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_final: Tensor,
    qkv: Tensor,
    slope: Tensor,
    table: Tensor,
    scans: Tensor,
    states: int,
    tokens: int,
    initial: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv and of the initial state. States are made anew: kept, they would cost memory in every layer."""
    (q, k, v), do = _parts(qkv), grad.contiguous()
    state = _states(k, v, slope, table, scans, states, initial, silu)
    d_state = torch.empty_like(state)
    d_state[scans[:, 0] + scans[:, 1]] = 0
    d_state[-1] = grad_final
    _run_scans(q, do, d_state, slope, table, scans, silu=(silu, False), reverse=True)
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    d_qkv[tokens:] = 0
    dq, dk, dv = _parts(d_qkv)
    raw = (q, k, v) if silu else (None, None, None)
    _attend(do, v, k, dq, state.mT, slope, table, silu=(False, silu, silu), raw=raw[0])
    _attend(v, do, q, dk, d_state.mT, slope, table, silu=(silu, False, silu), raw=raw[1], reverse=True)
    _attend(k, q, do, dv, d_state, slope, table, silu=(silu, silu, False), raw=raw[2], reverse=True)
    return d_qkv, d_state[0].clone()


@_backward.register_fake
def _(grad, grad_final, qkv, slope, table, scans, states, tokens, initial, silu):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), torch.empty_like(grad_final)


def _save(ctx, inputs, output) -> None:
    qkv, slope, table, scans, states, tokens, initial, silu = inputs
    ctx.save_for_backward(qkv, slope, table, scans, initial)
    ctx.numbers = (states, tokens, silu)


def _differentiate(ctx, grad: Tensor, grad_final: Tensor):
    qkv, slope, table, scans, initial = ctx.saved_tensors
    states, tokens, silu = ctx.numbers
    d_qkv, d_initial = torch.ops.trivium.lightning_attention_backward(
        grad, grad_final, qkv, slope, table, scans, states, tokens, initial, silu
    )
    return d_qkv, None, None, None, None, None, None if initial is None else d_initial, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _parts(qkv: Tensor) -> tuple[Tensor, ...]:
    """Views (T, H, N) of q, k and v."""
    size = qkv.shape[2] // 3
    if qkv.shape[2] != 3 * size or size not in HEAD_SIZES or qkv.stride(2) != 1:
        raise ValueError(f"need (T, H, 3N), N one of {HEAD_SIZES}, contiguous in the last; got {tuple(qkv.shape)}")
    return qkv.split(size, dim=2)


def _states(
    k: Tensor, v: Tensor, slope: Tensor, table: Tensor, scans: Tensor, states: int, initial: Tensor | None, silu: bool
) -> Tensor:
    """float32 (states, H, N, N): each scan's states, before its segments and after the last."""
    state = torch.empty(states, *k.shape[1:], k.shape[2], dtype=torch.float32, device=k.device)
    state[scans[:, 0]] = 0
    if initial is not None:
        state[0] = initial
    _run_scans(k, v, state, slope, table, scans, silu=(silu, silu), reverse=False)
    return state


def _run_scans(
    left: Tensor,
    right: Tensor,
    state: Tensor,
    slope: Tensor,
    table: Tensor,
    scans: Tensor,
    silu: tuple[bool, bool],
    reverse: bool,
) -> None:
    """The first two passes, from known states at one end of each scan."""
    heads, size = left.shape[1:]
    width, tile = min(size, WIDTH), min(SCAN_TILE, size * size)
    _local_kernel[(len(table) * (size // width), heads)](
        left, right, state, table, slope, *left.stride()[:2], *right.stride()[:2], heads,
        size, width, CHUNK, *silu, reverse, num_warps=WARPS,
    )  # fmt: skip
    _scan_kernel[(len(scans), heads, size * size // tile)](
        state, scans, table, slope, heads, size * size, tile, reverse, num_warps=4
    )


def _attend(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    out: Tensor,
    state: Tensor,
    slope: Tensor,
    table: Tensor,
    silu: tuple[bool, bool, bool],
    raw: Tensor | None = None,
    reverse: bool = False,
) -> None:
    """The third pass: out_t = sum over j <= t (reverse: j >= t) of exp(-s |t - j|) (a_t . b_j) c_j.

    silu: to which of the three it is applied. raw: what `out` is the gradient of the SiLU of.
    """
    heads, size = a.shape[1:]
    width = min(size, WIDTH)
    x = out if raw is None else raw
    strides = [n for tensor in (a, b, c, out, x) for n in tensor.stride()[:2]]
    _attend_kernel[(len(table) * (size // width), heads)](
        a, b, c, out, x, state, table, slope, *strides, *state.stride()[2:], heads,
        size, width, CHUNK, *silu, raw is not None, reverse, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip


@triton.jit
def _power(slope, distance):
    """exp(-slope * distance), distances below 0 taken as 0."""
    return tl.exp2(-slope * 1.4426950408889634 * tl.maximum(distance, 0).to(tl.float32))


@triton.jit
def _rows(x, begin, stop, stride, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SILU: tl.constexpr):
    """(CHUNK, WIDTH) of a matrix from row `begin` on, or its SiLU; rows from `stop` on are 0."""
    i = tl.arange(0, CHUNK)
    places = (begin + i).to(tl.int64)[:, None] * stride + tl.arange(0, WIDTH)[None, :]
    rows = tl.load(x + places, mask=(begin + i < stop)[:, None], other=0.0)
    if SILU:
        wide = rows.to(tl.float32)
        rows = (wide * tl.sigmoid(wide)).to(rows.dtype)
    return rows


@triton.jit
def _last_chunk_first(number, start, stop, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """Where chunk `number` of a segment begins; in reverse counted from the end."""
    if REVERSE:
        number = tl.cdiv(stop - start, CHUNK) - 1 - number
    return start + number * CHUNK


@triton.jit
def _local_kernel(
    left, right, state, table, slopes, left_t, left_h, right_t, right_h, heads,
    N: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    SILU_LEFT: tl.constexpr, SILU_RIGHT: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state after it, or in reverse to the one before it: sum of decayed left right^T."""
    segment, block, head = tl.program_id(0) // (N // WIDTH), tl.program_id(0) % (N // WIDTH), tl.program_id(1)
    start, stop = tl.load(table + 3 * segment), tl.load(table + 3 * segment + 1)
    place = tl.load(table + 3 * segment + 2)
    slope = tl.load(slopes + head)
    if place >= 0:
        i = tl.arange(0, CHUNK)
        left += head.to(tl.int64) * left_h
        right += head.to(tl.int64) * right_h + block * WIDTH
        acc = tl.zeros((N, WIDTH), tl.float32)
        for number in range(tl.cdiv(stop - start, CHUNK)):
            begin = _last_chunk_first(number, start, stop, CHUNK, REVERSE)
            size = tl.minimum(stop - begin, CHUNK)
            x = _rows(left, begin, stop, left_t, N, CHUNK, SILU_LEFT)
            y = _rows(right, begin, stop, right_t, WIDTH, CHUNK, SILU_RIGHT)
            x = (x * _power(slope, i + 1 if REVERSE else size - 1 - i)[:, None]).to(x.dtype)
            acc = acc * _power(slope, size) + tl.dot(tl.trans(x), y, input_precision="ieee")
        if not REVERSE:
            place += 1
        entry = tl.arange(0, N)[:, None] * N + block * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(state + (place.to(tl.int64) * heads + head) * N * N + entry, acc)


@triton.jit
def _scan_kernel(state, scans, table, slopes, heads, entries, TILE: tl.constexpr, REVERSE: tl.constexpr):
    """Add the state before each segment, decayed, to what the segment itself adds; in reverse from the last one on."""
    scan, head, tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    base, count, first = tl.load(scans + 3 * scan), tl.load(scans + 3 * scan + 1), tl.load(scans + 3 * scan + 2)
    slope = tl.load(slopes + head)
    entry = tile * TILE + tl.arange(0, TILE)
    begin = base
    if REVERSE:
        begin += count
    carry = tl.load(state + (begin.to(tl.int64) * heads + head) * entries + entry)
    for step in range(count):
        number, place = first + step, base + step + 1
        if REVERSE:
            number, place = first + count - 1 - step, base + count - 1 - step
        length = tl.load(table + 3 * number + 1) - tl.load(table + 3 * number)
        where = state + (place.to(tl.int64) * heads + head) * entries + entry
        carry = carry * _power(slope, length) + tl.load(where)
        tl.store(where, carry)


@triton.jit
def _attend_kernel(
    a, b, c, out, raw, state, table, slopes,
    a_t, a_h, b_t, b_h, c_t, c_h, out_t, out_h, raw_t, raw_h, state_n, state_m, heads,
    N: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    SILU_A: tl.constexpr, SILU_B: tl.constexpr, SILU_C: tl.constexpr, SILU_GRAD: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """A segment's output, WIDTH of the head's N dimensions, chunk by chunk from the state that comes into it.

    Programs of one segment run side by side: what they all read comes from memory once.
    """
    segment, block, head = tl.program_id(0) // (N // WIDTH), tl.program_id(0) % (N // WIDTH), tl.program_id(1)
    start, stop = tl.load(table + 3 * segment), tl.load(table + 3 * segment + 1)
    place = tl.load(table + 3 * segment + 2)
    slope = tl.load(slopes + head)
    i = tl.arange(0, CHUNK)
    apart = i[:, None] - i[None, :]
    if REVERSE:
        apart = -apart
    decays = tl.where(apart >= 0, _power(slope, apart), 0.0)
    a += head.to(tl.int64) * a_h
    b += head.to(tl.int64) * b_h
    c += head.to(tl.int64) * c_h + block * WIDTH
    out += head.to(tl.int64) * out_h + block * WIDTH
    raw += head.to(tl.int64) * raw_h + block * WIDTH
    acc = tl.zeros((N, WIDTH), tl.float32)
    if place >= 0:
        if REVERSE:
            place += 1
        entry = tl.arange(0, N)[:, None] * state_n + (block * WIDTH + tl.arange(0, WIDTH))[None, :] * state_m
        acc = tl.load(state + (place.to(tl.int64) * heads + head) * N * N + entry)
    for number in range(tl.cdiv(stop - start, CHUNK)):
        begin = _last_chunk_first(number, start, stop, CHUNK, REVERSE)
        size = tl.minimum(stop - begin, CHUNK)
        from_state = _power(slope, size - 1 - i if REVERSE else i + 1)
        to_state = _power(slope, i + 1 if REVERSE else size - 1 - i)
        x = _rows(a, begin, stop, a_t, N, CHUNK, SILU_A)
        y = _rows(b, begin, stop, b_t, N, CHUNK, SILU_B)
        z = _rows(c, begin, stop, c_t, WIDTH, CHUNK, SILU_C)
        score = tl.dot(x, tl.trans(y), input_precision="ieee") * decays
        result = tl.dot(x, acc.to(x.dtype), input_precision="ieee") * from_state[:, None]
        result += tl.dot(score.to(z.dtype), z, input_precision="ieee")
        if SILU_GRAD:
            wide = _rows(raw, begin, stop, raw_t, WIDTH, CHUNK, False).to(tl.float32)
            gate = tl.sigmoid(wide)
            result *= gate * (1 + wide * (1 - gate))
        rows = (begin + i).to(tl.int64)[:, None] * out_t + tl.arange(0, WIDTH)[None, :]
        tl.store(out + rows, result.to(out.dtype.element_ty), mask=(begin + i < stop)[:, None])
        y = (y * to_state[:, None]).to(y.dtype)
        acc = acc * _power(slope, size) + tl.dot(tl.trans(y), z, input_precision="ieee")
