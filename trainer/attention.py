"""The two kinds of attention over packed documents: lightning (linear, with decay) and softmax with partial RoPE.

Shape suffixes, here and in `model.py` and `moe.py`: T tokens of the packed stream, D hidden, H heads, K key/value
heads, N head dimension, R rotary dimension, V vocabulary, L layers, E experts, A experts per token, S = T * A rows
sorted by expert, F expert FFN, C chunks of the stream, B tokens per chunk (the block), G chunks of one scan step.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.documents import attend_documents

SCAN = 32  # chunks that the scan over states combines with one matrix product


def at_least_float32(x: torch.dtype) -> torch.dtype:
    return torch.promote_types(x, torch.float32)


@dataclass(frozen=True)
class Layout:
    """Where the documents lie in a packed stream: made once per batch, used by every layer.

    Chunks are cut from the stream, not from the documents, so that no token is padded however short the documents
    are; masks keep a chunk's documents apart. The stream's end is padded to a whole chunk (document -1).
    """

    cu_seqlens: list[int]  # document i is tokens [cu_seqlens[i], cu_seqlens[i + 1])
    cu_seqlens_device: Tensor  # the same, int32
    longest: int  # document's tokens
    position_T: Tensor  # int64, restarts at every document
    same_C1BB: Tensor  # query and key belong to one document
    inward_C1B1: Tensor  # the token belongs to the document that the state coming into the chunk belongs to
    outward_C1B1: Tensor  # ... to the one that the state leaving the chunk belongs to: its last
    last_C: Tensor  # that last document

    @classmethod
    def of(cls, cu_seqlens: list[int], block: int, device: torch.device | str = "cpu") -> "Layout":
        cu = torch.tensor(cu_seqlens, dtype=torch.int64)
        lengths = cu.diff()
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        position = torch.arange(len(document)) - torch.repeat_interleave(cu[:-1], lengths)
        chunked = F.pad(document, (0, -len(document) % block), value=-1).view(-1, block).to(device)
        last = chunked[:, -1]
        before = F.pad(last[:-1], (1, 0), value=-2)
        return cls(
            cu_seqlens=cu_seqlens,
            cu_seqlens_device=cu.to(device, torch.int32),
            longest=int(lengths.max()),
            position_T=position.to(device),
            same_C1BB=(chunked[:, :, None] == chunked[:, None, :])[:, None],
            inward_C1B1=(chunked == before[:, None])[:, None, :, None],
            outward_C1B1=(chunked == last[:, None])[:, None, :, None],
            last_C=last,
        )


@dataclass(frozen=True)
class Decay:
    """The powers of exp(-slope) that one layer's lightning attention needs."""

    inner_HBB: Tensor  # from key j to query i, 0 where j > i
    query_HB1: Tensor  # from the state before the chunk to query i
    key_HB1: Tensor  # from key j to the state after the chunk
    chunk_HGG: Tensor  # from one chunk's state to a later one's, 0 where it is earlier


def slopes(heads: int, layer: int, layers: int) -> Tensor:
    """Decay per token of each head in one layer (0-based, softmax layers counted), float64 (H)."""
    head = torch.arange(1, heads + 1, dtype=torch.float64)
    return 2.0 ** (-8.0 * head / heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)


@functools.cache
def decay(heads: int, layer: int, layers: int, block: int, device: torch.device, dtype: torch.dtype) -> Decay:
    """A layer's `Decay`, kept in float32 or better whatever the activations are."""
    s_H11 = slopes(heads, layer, layers)[:, None, None]
    i = torch.arange(block, dtype=torch.float64)
    g = torch.arange(SCAN + 1, dtype=torch.float64)

    def triangle(n: Tensor, unit: int) -> Tensor:
        return torch.exp(-s_H11 * unit * (n[:, None] - n).clamp(min=0)).tril()

    powers = (triangle(i, 1), torch.exp(-s_H11 * (i[:, None] + 1)), torch.exp(-s_H11 * (block - 1 - i[:, None])))
    return Decay(*(p.to(device, at_least_float32(dtype)) for p in (*powers, triangle(g, block))))


def lightning_attention(q_THN: Tensor, k_THN: Tensor, v_THN: Tensor, decay: Decay, layout: Layout) -> Tensor:
    """`S_t = exp(-s) S_{t-1} + k_t v_t^T`, `o_t = q_t^T S_t`, with S = 0 where a document starts. Returns (T, H, N).

    Within a chunk by masked matrix products, between chunks by a scan over the chunks' states.
    """
    tokens, dtype, block = len(q_THN), q_THN.dtype, decay.inner_HBB.shape[-1]

    def chunks(x_THN: Tensor) -> Tensor:
        x_THN = F.pad(x_THN, (0, 0, 0, 0, 0, -tokens % block))
        return x_THN.unflatten(0, (-1, block)).transpose(1, 2)

    q_CHBN, k_CHBN, v_CHBN = chunks(q_THN), chunks(k_THN), chunks(v_THN)
    score_CHBB = (q_CHBN @ k_CHBN.mT).mul_(decay.inner_HBB).mul_(layout.same_C1BB)
    out_CHBN = score_CHBB @ v_CHBN
    if len(q_CHBN) > 1:
        key_CHBN = (k_CHBN * (decay.key_HB1 * layout.outward_C1B1)).to(dtype)
        state_CHNN = scan(key_CHBN[:-1].mT @ v_CHBN[:-1], decay, layout.last_C)
        query_CHBN = (q_CHBN * (decay.query_HB1 * layout.inward_C1B1)).to(dtype)
        out_CHBN = out_CHBN + F.pad(query_CHBN[1:] @ state_CHNN.to(dtype), (0, 0, 0, 0, 0, 0, 1, 0))
    return out_CHBN.transpose(1, 2).flatten(0, 1)[:tokens]


def scan(local_CHNN: Tensor, decay: Decay, last_C: Tensor) -> Tensor:
    """The state after every chunk, given each chunk's own contribution to it: SCAN chunks at a time."""
    states = []
    carry_1HX: Tensor = local_CHNN.new_zeros(1, *local_CHNN.shape[1:]).flatten(2).to(decay.chunk_HGG.dtype)
    for start in range(0, len(local_CHNN), SCAN):
        local_GHX = torch.cat([carry_1HX, local_CHNN[start : start + SCAN].flatten(2)])
        # The carry counts as one more chunk before these. A state reaches a later chunk's if both end in one document.
        last_G = last_C[max(start - 1, 0) : start + len(local_GHX) - 1]
        last_G = F.pad(last_G, (len(local_GHX) - len(last_G), 0), value=-2)
        weight_HGG = decay.chunk_HGG[:, : len(last_G), : len(last_G)] * (last_G[:, None] == last_G)
        state_GHX = (weight_HGG[:, 1:] @ local_GHX.transpose(0, 1)).transpose(0, 1)
        states.append(state_GHX)
        carry_1HX = state_GHX[-1:]
    return torch.cat(states).unflatten(2, local_CHNN.shape[2:])


def rotary_angles(position_T: Tensor, rotary_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), both (T, 1, R/2). The angles are float64: in float32 they are off by 0.04 rad at position 1M."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=position_T.device) / rotary_dim
    angle_T1r = position_T.double()[:, None, None] * base**-exponent
    return angle_T1r.cos().to(dtype), angle_T1r.sin().to(dtype)


def rotate(x_THN: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> Tensor:
    """Rotate the first R of the N dimensions, half-split: dimension i pairs with i + R/2."""
    half = cos_T1r.shape[-1]
    a, b, rest = x_THN.split([half, half, x_THN.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos_T1r - b * sin_T1r, b * cos_T1r + a * sin_T1r, rest], dim=-1)


def softmax_attention(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: Layout) -> Tensor:
    """Causal attention within each document, scale N^-0.5; key/value heads shared by H/K query heads. (T, H, N)."""
    if q_THN.is_cuda and q_THN.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        cu = layout.cu_seqlens_device
        k_THN, v_THN = (x.repeat_interleave(q_THN.shape[1] // x.shape[1], dim=1) for x in (k_TKN, v_TKN))
        out_THN = varlen_attn(q_THN, k_THN, v_THN, cu, cu, layout.longest, layout.longest, window_size=(-1, 0))
        assert isinstance(out_THN, Tensor)
        return out_THN
    return attend_documents(q_THN, k_TKN, v_TKN, layout.cu_seqlens_device, layout.cu_seqlens_device)
