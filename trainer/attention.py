"""The two kinds of attention over packed documents: lightning (linear, with decay) and softmax with partial RoPE.

Shape suffixes, here and in `model.py`, `moe.py` and `grouped.py`: T tokens of the packed stream (under context
parallelism this rank's slice of it), D hidden, H heads, K key/value heads, N head dimension, r half of the rotary
dimension, V vocabulary, L layers, E experts, A experts per token, S = T * A rows sorted by expert, F expert FFN (of
any matrix: O rows out, I in), G routing groups, R ranks; of lightning attention: C chunks of the stream, B tokens per
chunk (the block), G chunks of one scan step, X = N * N entries of a state. A digit is a dimension of that size.
"""

import functools
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from trainer.collectives import AllGather
from trainer.ring import ring_attention

if TYPE_CHECKING:
    from kernels.lightning_attention import Segments

PART = 8192  # tokens of a part of the stream (`Layout.parts`)
SCAN = 32  # chunks that the scan over states combines with one matrix product


def at_least_float32(x: torch.dtype) -> torch.dtype:
    return torch.promote_types(x, torch.float32)


@dataclass(frozen=True)
class Layout:
    """Where the documents lie in a packed stream: made once per batch, used by every layer.

    Chunks are cut from the stream, not from the documents, so that no token is padded however short the documents
    are; masks keep a chunk's documents apart. The stream's end is padded to a whole chunk (document -1).

    Under context parallelism the ranks of `cp` hold equal slices of the stream, in order, and everything here is about
    this rank's slice; only its first document may have begun on a rank before.
    """

    cu_seqlens: list[int]  # document i is tokens [cu_seqlens[i], cu_seqlens[i + 1]) of the slice
    cu_keys: list[int]  # its keys, those of ranks before too, are [cu_keys[i], cu_keys[i + 1]) of the stream's `keys`
    keys: slice
    part: slice  # where the slice lies in the stream
    cu_seqlens_device: Tensor  # the same, int32
    cu_keys_device: Tensor
    longest: tuple[int, int]  # most queries and most keys of one document
    position_T: Tensor  # int64, restarts at every document
    group_T: Tensor  # int64: the routing group of the token (`moe.py`); -1: padding
    member_GT: Tensor  # the same as a mask
    same_CBB: Tensor  # query and key belong to one document
    inward_CB1: Tensor  # the token belongs to the document that the state coming into the chunk belongs to
    outward_CB1: Tensor  # ... to the one that the state leaving the chunk belongs to: its last
    last_C: Tensor  # that last document
    reached_C: Tensor  # the state coming into the chunk holds a document that began on a rank before
    between_R: Tensor  # tokens between rank R's slice and this one; infinite where its last document ends before
    segments: "Segments | None"  # on a GPU whose slice is the whole stream: what our kernels read
    cp: DeviceMesh | None

    @classmethod
    def of(
        cls, cu_seqlens: list[int], block: int, device: torch.device | str = "cpu",
        group_T: Tensor | None = None, groups: int = 1, cp: DeviceMesh | None = None,
    ) -> "Layout":  # fmt: skip
        """Of the whole stream's documents (and groups: by default one without padding), the part of this rank."""
        cu = torch.tensor(cu_seqlens, dtype=torch.int64)
        whole = torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff())
        rank, ranks = (0, 1) if cp is None else (cp.get_local_rank(), cp.size())
        tokens = len(whole) // ranks
        assert tokens * ranks == len(whole)
        start, stop = rank * tokens, (rank + 1) * tokens

        document = whole[start:stop]
        group_T = (torch.zeros_like(whole) if group_T is None else group_T.cpu())[start:stop]
        local = torch.unique(cu.clamp(start, stop) - start)
        first_key = int(cu[document[0]])
        keys = F.pad(local[1:] + start - first_key, (1, 0))
        chunked = F.pad(document, (0, -tokens % block), value=-1).view(-1, block)
        last = F.pad(chunked[:-1, -1], (0, 1), value=int(document[-1]))
        incoming = int(whole[start - 1]) if rank else -2
        before = F.pad(last[:-1], (1, 0), value=incoming)
        ends = whole[tokens - 1 :: tokens][:rank]  # the last document of every rank before
        between = torch.arange(rank - 1, -1, -1).double().mul(tokens).masked_fill(ends != document[0], torch.inf)
        segments = None
        if torch.device(device).type == "cuda" and cp is None:
            from kernels.lightning_attention import Segments

            segments = Segments.of(local.tolist(), device)
        return cls(
            cu_seqlens=local.tolist(),
            cu_keys=keys.tolist(),
            keys=slice(first_key, stop),
            part=slice(start, stop),
            cu_seqlens_device=local.to(device, torch.int32),
            cu_keys_device=keys.to(device, torch.int32),
            longest=(int(local.diff().max()), int(keys.diff().max())),
            position_T=(torch.arange(start, stop) - cu[document]).to(device),
            group_T=group_T.to(device),
            member_GT=(group_T == torch.arange(groups)[:, None]).to(device),
            same_CBB=(chunked[:, :, None] == chunked[:, None, :]).to(device),
            inward_CB1=(chunked == before[:, None])[:, :, None].to(device),
            outward_CB1=(chunked == last[:, None])[:, :, None].to(device),
            last_C=last.to(device),
            reached_C=(before == incoming).to(device),
            between_R=F.pad(between, (0, ranks - rank), value=torch.inf).to(device),
            segments=segments,
            cp=cp,
        )

    @functools.cached_property
    def parts(self) -> list[tuple[slice, "Layout"]]:
        """The stream cut between documents into parts of about PART tokens: where each lies, and its layout."""
        cuts = [0]
        for _, end in pairwise(self.cu_seqlens):
            if end - cuts[-1] >= PART or end == self.cu_seqlens[-1]:
                cuts.append(end)
        block, device, groups = self.same_CBB.shape[-1], self.position_T.device, len(self.member_GT)
        parts, starts = [], np.array(self.cu_seqlens)
        for part in (slice(*cut) for cut in pairwise(cuts)):
            own = starts[(starts >= part.start) & (starts <= part.stop)] - part.start
            parts.append((part, Layout.of(own.tolist(), block, device, self.group_T[part], groups)))
        return parts


@dataclass(frozen=True)
class Decay:
    """The powers of exp(-slope) that one layer's lightning attention needs."""

    inner_H1BB: Tensor  # from key j to query i, 0 where j > i
    query_H1B1: Tensor  # from the state before the chunk to query i
    key_H1B1: Tensor  # from key j to the state after the chunk
    chunk_HGG: Tensor  # from one chunk's state to a later one's, 0 where it is earlier
    slope_H111: Tensor  # float64


def slopes(heads: int, layer: int, layers: int) -> Tensor:
    """Decay per token of each head in one layer (0-based, softmax layers counted), float64 (H)."""
    head = torch.arange(1, heads + 1, dtype=torch.float64)
    return 2.0 ** (-8.0 * head / heads) * (1 - layer / (layers - 1 + 1e-5) + 1e-5)


@functools.cache
def decay(heads: int, layer: int, layers: int, block: int, device: torch.device, dtype: torch.dtype) -> Decay:
    """A layer's `Decay`, kept in float32 or better whatever the activations are."""
    s_H111 = slopes(heads, layer, layers)[:, None, None, None]
    i_B1 = torch.arange(block, dtype=torch.float64)[:, None]
    g_G1 = torch.arange(SCAN + 1, dtype=torch.float64)[:, None]

    def power(n: Tensor) -> Tensor:
        return torch.exp(-s_H111 * n.clamp(min=0)).to(device, at_least_float32(dtype))

    inner_H1BB, chunk_H1GG = power(i_B1 - i_B1.mT).tril(), power(block * (g_G1 - g_G1.mT)).tril()
    return Decay(inner_H1BB, power(i_B1 + 1), power(block - 1 - i_B1), chunk_H1GG[:, 0], s_H111.to(device))


def lightning_attention(qkv_TH3N: Tensor, decay: Decay, layout: Layout) -> Tensor:
    """`S_t = exp(-s) S_{t-1} + k_t v_t^T`, `o_t = q_t^T S_t`, with S = 0 where a document starts. Returns (T, H, N).

    q, k and v are the SiLU of what is given.
    """
    if layout.segments is not None and qkv_TH3N.dtype != torch.float64:
        from kernels import lightning_attention as kernel

        if qkv_TH3N.shape[-1] // 3 in kernel.HEAD_SIZES:
            slope_H = decay.slope_H111.flatten().float()
            return kernel.lightning_attention(qkv_TH3N, slope_H, layout.segments, silu=True)[0]
    return in_chunks(qkv_TH3N, decay, layout)


def in_chunks(qkv_TH3N: Tensor, decay: Decay, layout: Layout) -> Tensor:
    """The same in plain PyTorch: masked matrix products within a chunk, a scan over states between chunks."""
    tokens, dtype, block = len(qkv_TH3N), qkv_TH3N.dtype, decay.inner_H1BB.shape[-1]
    qkv_HT3N = qkv_TH3N.transpose(0, 1)
    if tokens % block:
        qkv_HT3N = F.pad(qkv_HT3N, (0, 0, 0, -tokens % block))
    # One copy with heads outermost; no matrix product below then copies what it takes.
    qkv_HCB3N = F.silu(qkv_HT3N.contiguous()).unflatten(1, (-1, block))
    q_HCBN, k_HCBN, v_HCBN = qkv_HCB3N.chunk(3, dim=-1)

    score_HCBB = (q_HCBN @ k_HCBN.mT).mul_(decay.inner_H1BB).mul_(layout.same_CBB)
    key_HCBN = (k_HCBN * (decay.key_H1B1 * layout.outward_CB1)).to(dtype)
    query_HCBN = (q_HCBN * (decay.query_H1B1 * layout.inward_CB1)).to(dtype)
    state_HCNN = scan((key_HCBN.mT @ v_HCBN)[:, :-1], decay, layout.last_C)
    if layout.cp is not None:
        rows = (tokens - 1) % block + 1
        state_HCNN = across_ranks(state_HCNN, k_HCBN[:, -1, :rows], v_HCBN[:, -1, :rows], decay, layout)
    out_HCBN = score_HCBB @ v_HCBN + query_HCBN @ state_HCNN.to(dtype)
    return out_HCBN.flatten(1, 2)[:, :tokens].transpose(0, 1)


def scan(local_HCNN: Tensor, decay: Decay, last_C: Tensor) -> Tensor:
    """The state coming into every chunk, given what each but the last adds to it: SCAN chunks at a time."""
    heads, _, *size = local_HCNN.shape
    states_H1X = [local_HCNN.new_zeros(heads, 1, math.prod(size), dtype=decay.chunk_HGG.dtype)]
    for start in range(0, local_HCNN.shape[1], SCAN):
        # The state so far counts as one more chunk before. One reaches a later chunk's if both end in one document.
        local_HGX = torch.cat([states_H1X[-1][:, -1:], local_HCNN[:, start : start + SCAN].flatten(2)], dim=1)
        last_G = last_C[max(start - 1, 0) : start + local_HGX.shape[1] - 1]
        last_G = F.pad(last_G, (local_HGX.shape[1] - len(last_G), 0), value=-2)
        weight_HGG = decay.chunk_HGG[:, : len(last_G), : len(last_G)] * (last_G[:, None] == last_G)
        states_H1X.append(weight_HGG[:, 1:] @ local_HGX)
    return torch.cat(states_H1X, dim=1).unflatten(2, size)


def across_ranks(state_HCNN: Tensor, k_HBN: Tensor, v_HBN: Tensor, decay: Decay, layout: Layout) -> Tensor:
    """LASP+ with decay and document boundaries: the states coming into all chunks, those of ranks before included.

    state_HCNN: the same as if the stream began with this slice. k, v: the last chunk's tokens. (1) The state this rank
    ends with is gathered, (2) those of the ranks before that end in the document this one begins with are summed, each
    decayed over the ranks between, and (3) since all is linear, the sum is added to the states of the chunks it
    reaches, decayed over the chunks before.
    """
    assert layout.cp is not None
    rows, wide, slope_H111 = k_HBN.shape[1], decay.key_H1B1.dtype, decay.slope_H111
    key_HBN = k_HBN * decay.key_H1B1[:, 0, -rows:] * layout.outward_CB1[-1, :rows]
    goes_on = layout.inward_CB1[-1, rows - 1]  # the state coming into the last chunk is of the document it ends with
    leaving_HNN = key_HBN.mT @ v_HBN.to(wide)
    leaving_HNN = leaving_HNN + state_HCNN[:, -1] * decay.query_H1B1[:, 0, rows - 1 : rows] * goes_on
    leaving_RHNN = AllGather.apply(leaving_HNN[None], layout.cp.get_group())
    weight_HR = torch.exp(-slope_H111[:, 0, 0] * layout.between_R).to(wide)
    coming_HNN = torch.einsum("hr,rhnm->hnm", weight_HR, leaving_RHNN)
    chunk_C11 = torch.arange(len(layout.last_C), device=k_HBN.device)[:, None, None] * decay.inner_H1BB.shape[-1]
    fade_HC11 = torch.exp(-slope_H111 * chunk_C11) * layout.reached_C[:, None, None]
    return state_HCNN + fade_HC11.to(wide) * coming_HNN[:, None]


def rotary_angles(position_T: Tensor, rotary_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), both (T, 1, R/2). The angles are float64: in float32 they are off by 0.04 rad at position 1M."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=position_T.device) / rotary_dim
    angle_T1r = position_T.double()[:, None, None] * base**-exponent
    return angle_T1r.cos().to(dtype), angle_T1r.sin().to(dtype)


def rotate(x_THN: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> Tensor:
    """Rotate the first R of the N dimensions, half-split: dimension i pairs with i + R/2."""
    half = cos_T1r.shape[-1]
    a, b, rest = x_THN.split([half, half, x_THN.shape[-1] - 2 * half], dim=-1)
    turned = a * cos_T1r - b * sin_T1r, b * cos_T1r + a * sin_T1r
    return torch.cat([*(x.to(rest.dtype) for x in turned), rest], dim=-1)


def softmax_attention(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: Layout, ring: bool = False) -> Tensor:
    """Causal attention within each document, scale N^-0.5; key/value heads shared by H/K query heads. (T, H, N).

    Under context parallelism keys and values of the whole stream are gathered, for a few heads have them; or, with
    `ring`, passed from rank to rank.
    """
    if layout.cp is not None and ring:
        return ring_attention(q_THN, k_TKN, v_TKN, layout)
    if layout.cp is not None:
        both_TKN = AllGather.apply(torch.cat([k_TKN, v_TKN], dim=1), layout.cp.get_group())
        k_TKN, v_TKN = both_TKN[layout.keys].chunk(2, dim=1)
    if q_THN.is_cuda and q_THN.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        cu = layout.cu_seqlens_device, layout.cu_keys_device
        k_THN, v_THN = (x.repeat_interleave(q_THN.shape[1] // x.shape[1], dim=1) for x in (k_TKN, v_TKN))
        out_THN = varlen_attn(q_THN, k_THN, v_THN, *cu, *layout.longest, window_size=(-1, 0))
        assert isinstance(out_THN, Tensor)
        return out_THN
    return attend_documents(q_THN, k_TKN, v_TKN, layout)


def attend_documents(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: Layout) -> Tensor:
    """The documents one by one, where torch has no kernel for packed ones: on the CPU, and in float32."""
    queries, keys = ([b - a for a, b in pairwise(cu)] for cu in (layout.cu_seqlens, layout.cu_keys))
    out = []  # not by slices: the gradient of each would be as long as the stream
    for q_tHN, k_tKN, v_tKN in zip(q_THN.split(queries), k_TKN.split(keys), v_TKN.split(keys), strict=True):
        q, k, v = (x.transpose(0, 1)[None] for x in (q_tHN, k_tKN, v_tKN))
        earlier = len(k_tKN) - len(q_tHN)  # keys on ranks before
        mask = q.new_ones(len(q_tHN), len(k_tKN), dtype=torch.bool).tril(earlier) if earlier else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not earlier, enable_gqa=True)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)
