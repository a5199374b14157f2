"""Lightning attention over packed documents on the GPU (Triton): forward, backward, state in and state out.

`S_t = exp(-s) S_{t-1} + k_t v_t^T`, `o_t = q_t^T S_t` (arXiv 2501.08313, section 2.2.2; scale 1), S = 0 where a
document starts. Documents are cut into segments and those into chunks. Three passes, all of them parallel over segments:

    local   what each segment adds to the state                     (matrix products, states held in registers)
    scan    the state that comes into each segment                  (a few bytes per token)
    output  chunk by chunk from that state on                       (matrix products)

Backward is the same three passes from the other end. Documents of one segment, which most are, need only the last.
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
    size = _head_size(qkv)
    heads = qkv.shape[1]
    state = _states(qkv, slope, table, scans, states, initial, silu)
    out = qkv.new_empty(len(qkv), heads, size)
    out[tokens:] = 0
    width = min(size, 64)
    _output[(len(table), heads, size // width)](
        qkv, out, state, table, slope, qkv.stride(0), qkv.stride(1), heads, size, width, CHUNK, silu, num_warps=4
    )
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
    size, heads = _head_size(qkv), qkv.shape[1]
    grad = grad.contiguous()
    state = _states(qkv, slope, table, scans, states, initial, silu)
    d_state = state.new_empty(state.shape)
    d_state[scans[:, 0] + scans[:, 1]] = 0
    d_state[-1] = grad_final
    _run_states(qkv, grad, d_state, slope, table, scans, silu, reverse=True)
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    d_qkv[tokens:] = 0
    arguments = (qkv, grad, d_qkv, table, slope, qkv.stride(0), qkv.stride(1), heads, size, CHUNK, silu)
    grid = (len(table), heads)
    _grad_query[grid](state, *arguments, num_warps=8)
    _grad_key_value[grid](d_state, *arguments, num_warps=8)
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


def _head_size(qkv: Tensor) -> int:
    size = qkv.shape[2] // 3
    if qkv.shape[2] != 3 * size or size not in (16, 32, 64, 128) or qkv.stride(2) != 1:
        raise ValueError(f"need (T, H, 3N), N 16, 32, 64 or 128, contiguous in the last; got {tuple(qkv.shape)}")
    return size


def _states(
    qkv: Tensor, slope: Tensor, table: Tensor, scans: Tensor, states: int, initial: Tensor | None, silu: bool
) -> Tensor:
    """float32 (states, H, N, N): each scan's states, before its segments and after the last."""
    size = qkv.shape[2] // 3
    state = torch.empty(states, qkv.shape[1], size, size, dtype=torch.float32, device=qkv.device)
    state[scans[:, 0]] = 0
    if initial is not None:
        state[0] = initial
    _run_states(qkv, qkv, state, slope, table, scans, silu, reverse=False)
    return state


def _run_states(
    qkv: Tensor,
    other: Tensor,
    state: Tensor,
    slope: Tensor,
    table: Tensor,
    scans: Tensor,
    silu: bool,
    reverse: bool,
) -> None:
    """The first two passes; `other` is the output's gradient where they run from the other end."""
    size, heads = qkv.shape[2] // 3, qkv.shape[1]
    width = min(size, 64)
    _local[(len(table), heads, size // width)](
        qkv, other, state, table, slope, qkv.stride(0), qkv.stride(1), heads, size, width, CHUNK, silu, reverse,
        num_warps=4,
    )  # fmt: skip
    tile = min(SCAN_TILE, size * size)
    _scan[(len(scans), heads, size * size // tile)](
        state, scans, table, slope, heads, size * size, tile, reverse, num_warps=4
    )


@triton.jit
def _power(slope, distance):
    """exp(-slope * distance), distances below 0 taken as 0."""
    return tl.exp2(-slope * 1.4426950408889634 * tl.maximum(distance, 0).to(tl.float32))


@triton.jit
def _silu(x, SILU: tl.constexpr):
    if SILU:
        wide = x.to(tl.float32)
        x = (wide * tl.sigmoid(wide)).to(x.dtype)
    return x


@triton.jit
def _silu_grad(x, grad, SILU: tl.constexpr):
    if SILU:
        wide = x.to(tl.float32)
        gate = tl.sigmoid(wide)
        grad = grad * gate * (1 + wide * (1 - gate))
    return grad


@triton.jit
def _rows(x, begin, stop, stride, width: tl.constexpr, CHUNK: tl.constexpr):
    """(CHUNK, width) of a matrix from row `begin` on; rows from `stop` on are 0."""
    i = tl.arange(0, CHUNK)
    places = (begin + i).to(tl.int64)[:, None] * stride + tl.arange(0, width)[None, :]
    return tl.load(x + places, mask=(begin + i < stop)[:, None], other=0.0)


@triton.jit
def _store_rows(x, value, begin, stop, stride, width: tl.constexpr, CHUNK: tl.constexpr):
    i = tl.arange(0, CHUNK)
    places = (begin + i).to(tl.int64)[:, None] * stride + tl.arange(0, width)[None, :]
    tl.store(x + places, value.to(x.dtype.element_ty), mask=(begin + i < stop)[:, None])


@triton.jit
def _decays(slope, CHUNK: tl.constexpr):
    """(CHUNK, CHUNK): from key j to query i, 0 where j > i."""
    i = tl.arange(0, CHUNK)
    return tl.where(i[:, None] >= i[None, :], _power(slope, i[:, None] - i[None, :]), 0.0)


@triton.jit
def _state(states, place, head, heads, column, N: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH columns of a state from `column` on; zeros for place -1."""
    acc = tl.zeros((N, WIDTH), tl.float32)
    if place >= 0:
        entry = tl.arange(0, N)[:, None] * N + column + tl.arange(0, WIDTH)[None, :]
        acc = tl.load(states + (place.to(tl.int64) * heads + head) * N * N + entry)
    return acc


@triton.jit
def _local(
    qkv, other, state, table, slopes, stride_t, stride_h, heads,
    N: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SILU: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state after it: sum of decayed k v^T. In reverse, to the gradient of the state before
    it: sum of decayed q do^T."""
    segment, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(table + 3 * segment), tl.load(table + 3 * segment + 1)
    place = tl.load(table + 3 * segment + 2)
    slope = tl.load(slopes + head)
    if place >= 0:
        i = tl.arange(0, CHUNK)
        inputs = qkv + head.to(tl.int64) * stride_h
        acc = tl.zeros((N, WIDTH), tl.float32)
        chunks = tl.cdiv(stop - start, CHUNK)
        for number in range(chunks):
            if REVERSE:
                begin = start + (chunks - 1 - number) * CHUNK
                left = _silu(_rows(inputs, begin, stop, stride_t, N, CHUNK), SILU)
                right = _rows(other + head * N + block * WIDTH, begin, stop, heads * N, WIDTH, CHUNK)
                weight = _power(slope, i + 1)
            else:
                begin = start + number * CHUNK
                left = _silu(_rows(inputs + N, begin, stop, stride_t, N, CHUNK), SILU)
                right = _silu(_rows(inputs + 2 * N + block * WIDTH, begin, stop, stride_t, WIDTH, CHUNK), SILU)
                weight = _power(slope, tl.minimum(stop - begin, CHUNK) - 1 - i)
            size = tl.minimum(stop - begin, CHUNK)
            left = (left * weight[:, None]).to(left.dtype)
            acc = acc * _power(slope, size) + tl.dot(tl.trans(left), right, input_precision="ieee")
        if not REVERSE:
            place += 1
        entry = tl.arange(0, N)[:, None] * N + block * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(state + (place.to(tl.int64) * heads + head) * N * N + entry, acc)


@triton.jit
def _scan(state, scans, table, slopes, heads, entries, TILE: tl.constexpr, REVERSE: tl.constexpr):
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
def _output(
    qkv, out, state, table, slopes, stride_t, stride_h, heads,
    N: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """A segment's output, WIDTH of the head's N dimensions."""
    segment, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(table + 3 * segment), tl.load(table + 3 * segment + 1)
    place = tl.load(table + 3 * segment + 2)
    slope = tl.load(slopes + head)
    i = tl.arange(0, CHUNK)
    decays, after = _decays(slope, CHUNK), _power(slope, i + 1)
    inputs = qkv + head.to(tl.int64) * stride_h
    acc = _state(state, place, head, heads, block * WIDTH, N, WIDTH)
    for begin in range(start, stop, CHUNK):
        size = tl.minimum(stop - begin, CHUNK)
        q = _silu(_rows(inputs, begin, stop, stride_t, N, CHUNK), SILU)
        k = _silu(_rows(inputs + N, begin, stop, stride_t, N, CHUNK), SILU)
        v = _silu(_rows(inputs + 2 * N + block * WIDTH, begin, stop, stride_t, WIDTH, CHUNK), SILU)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * decays
        result = tl.dot(q, acc.to(q.dtype), input_precision="ieee") * after[:, None]
        result += tl.dot(score.to(v.dtype), v, input_precision="ieee")
        _store_rows(out + head * N + block * WIDTH, result, begin, stop, heads * N, WIDTH, CHUNK)
        k = (k * _power(slope, size - 1 - i)[:, None]).to(k.dtype)
        acc = acc * _power(slope, size) + tl.dot(tl.trans(k), v, input_precision="ieee")


@triton.jit
def _grad_query(
    state, qkv, grad, d_qkv, table, slopes, stride_t, stride_h, heads,
    N: tl.constexpr, CHUNK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    segment, head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(table + 3 * segment), tl.load(table + 3 * segment + 1)
    place = tl.load(table + 3 * segment + 2)
    slope = tl.load(slopes + head)
    i = tl.arange(0, CHUNK)
    decays, after = _decays(slope, CHUNK), _power(slope, i + 1)
    inputs = qkv + head.to(tl.int64) * stride_h
    acc = _state(state, place, head, heads, 0, N, N)
    for begin in range(start, stop, CHUNK):
        size = tl.minimum(stop - begin, CHUNK)
        k = _silu(_rows(inputs + N, begin, stop, stride_t, N, CHUNK), SILU)
        v = _silu(_rows(inputs + 2 * N, begin, stop, stride_t, N, CHUNK), SILU)
        do = _rows(grad + head * N, begin, stop, heads * N, N, CHUNK)
        d_score = tl.dot(do, tl.trans(v), input_precision="ieee") * decays
        dq = tl.dot(do, tl.trans(acc).to(do.dtype), input_precision="ieee") * after[:, None]
        dq += tl.dot(d_score.to(k.dtype), k, input_precision="ieee")
        dq = _silu_grad(_rows(inputs, begin, stop, stride_t, N, CHUNK), dq, SILU)
        _store_rows(d_qkv + head * 3 * N, dq, begin, stop, heads * 3 * N, N, CHUNK)
        k = (k * _power(slope, size - 1 - i)[:, None]).to(k.dtype)
        acc = acc * _power(slope, size) + tl.dot(tl.trans(k), v, input_precision="ieee")


@triton.jit
def _grad_key_value(
    d_state, qkv, grad, d_qkv, table, slopes, stride_t, stride_h, heads,
    N: tl.constexpr, CHUNK: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """From a segment's last chunk to its first, with the gradient of the state after each."""
    segment, head = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(table + 3 * segment), tl.load(table + 3 * segment + 1)
    place = tl.load(table + 3 * segment + 2)
    slope = tl.load(slopes + head)
    i = tl.arange(0, CHUNK)
    decays, after = _decays(slope, CHUNK), _power(slope, i + 1)
    inputs = qkv + head.to(tl.int64) * stride_h
    acc = _state(d_state, tl.where(place >= 0, place + 1, -1), head, heads, 0, N, N)
    chunks = tl.cdiv(stop - start, CHUNK)
    for number in range(chunks):
        begin = start + (chunks - 1 - number) * CHUNK
        size = tl.minimum(stop - begin, CHUNK)
        before = _power(slope, size - 1 - i)
        q = _silu(_rows(inputs, begin, stop, stride_t, N, CHUNK), SILU)
        k_raw = _rows(inputs + N, begin, stop, stride_t, N, CHUNK)
        v_raw = _rows(inputs + 2 * N, begin, stop, stride_t, N, CHUNK)
        k, v = _silu(k_raw, SILU), _silu(v_raw, SILU)
        do = _rows(grad + head * N, begin, stop, heads * N, N, CHUNK)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * decays
        dv = tl.dot(k, acc.to(k.dtype), input_precision="ieee") * before[:, None]
        dv += tl.dot(tl.trans(score.to(do.dtype)), do, input_precision="ieee")
        d_score = tl.dot(do, tl.trans(v), input_precision="ieee") * decays
        dk = tl.dot(v, tl.trans(acc).to(v.dtype), input_precision="ieee") * before[:, None]
        dk += tl.dot(tl.trans(d_score.to(q.dtype)), q, input_precision="ieee")
        d_inputs = d_qkv + head * 3 * N
        _store_rows(d_inputs + N, _silu_grad(k_raw, dk, SILU), begin, stop, heads * 3 * N, N, CHUNK)
        _store_rows(d_inputs + 2 * N, _silu_grad(v_raw, dv, SILU), begin, stop, heads * 3 * N, N, CHUNK)
        q = (q * after[:, None]).to(q.dtype)
        acc = acc * _power(slope, size) + tl.dot(tl.trans(q), do, input_precision="ieee")
