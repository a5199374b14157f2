"""The two kinds of attention over packed documents: lightning (linear, with decay) and softmax with partial RoPE.

Shape suffixes, here and in `model.py` and `moe.py`: T tokens of the packed stream (under context parallelism this
rank's slice of it), t those of one document, D hidden, H heads, K key/value heads, N head dimension, r half of the
rotary dimension, V vocabulary, L layers, E experts, A experts per token, S = T * A rows sorted by expert, F expert FFN,
G routing groups, R ranks. A digit is a dimension of that size.
"""

import functools
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from kernels import fused, lightning_chunks
from kernels.lightning_chunks import Chunks, Decay
from kernels.varlen_attention import attend_documents
from trainer.collectives import AllGather
from trainer.ring import ring_attention

if TYPE_CHECKING:
    from kernels.lightning_attention import Segments

PART = 16384  # tokens of a part of the stream (`Layout.parts`)


@dataclass(frozen=True)
class Layout:
    """Where the documents lie in a packed stream: made once per batch, used by every layer.

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
    between_R: Tensor  # tokens between rank R's slice and this one; infinite where its last document ends before
    chunks: Chunks  # what lightning attention reads
    segments: "Segments | None"  # ... on a GPU
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
        ends = whole[tokens - 1 :: tokens][:rank]  # the last document of every rank before
        between = torch.arange(rank - 1, -1, -1).double().mul(tokens).masked_fill(ends != document[0], torch.inf)
        segments = None
        if torch.device(device).type == "cuda":
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
            between_R=F.pad(between, (0, ranks - rank), value=torch.inf).to(device),
            chunks=Chunks.of(document, block, device),
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
        block, device, groups = self.chunks.same_CBB.shape[-1], self.position_T.device, len(self.member_GT)
        parts, starts = [], np.array(self.cu_seqlens)
        for part in (slice(*cut) for cut in pairwise(cuts)):
            own = starts[(starts >= part.start) & (starts <= part.stop)] - part.start
            parts.append((part, Layout.of(own.tolist(), block, device, self.group_T[part], groups)))
        return parts


def lightning_attention(qkv_TH3N: Tensor, decay: Decay, layout: Layout) -> Tensor:
    """`S_t = exp(-s) S_{t-1} + k_t v_t^T`, `o_t = q_t^T S_t`, with S = 0 where a document starts. Returns (T, H, N).

    q, k and v are the SiLU of what is given.
    """
    out_THN, final_HNN = of_slice(qkv_TH3N, decay, layout)
    return out_THN if layout.cp is None else across_ranks(out_THN, final_HNN, qkv_TH3N, decay, layout)


def of_slice(qkv_TH3N: Tensor, decay: Decay, layout: Layout) -> tuple[Tensor, Tensor]:
    """The same of this rank's slice alone, and the state it ends with (H, N, N)."""
    if layout.segments is not None and fused.on_gpu(qkv_TH3N):
        from kernels import lightning_attention as kernel

        if qkv_TH3N.shape[-1] // 3 in kernel.HEAD_SIZES:
            return kernel.lightning_attention(qkv_TH3N, decay.slope_H.float(), layout.segments, silu=True)
    return lightning_chunks.lightning_attention(qkv_TH3N, decay, layout.chunks)


def across_ranks(out_THN: Tensor, final_HNN: Tensor, qkv_TH3N: Tensor, decay: Decay, layout: Layout) -> Tensor:
    """LASP+ with decay and document boundaries: what a slice computed alone, and what states of ranks before add to it.

    (1) The states that the ranks end with are gathered. (2) Those of the ranks before that end in the document this one
    begins with are summed, each decayed over the ranks between. (3) Since all is linear, that document's queries add
    what they find in the sum, decayed over the tokens before them.
    """
    assert layout.cp is not None
    final_RHNN = AllGather.apply(final_HNN[None], layout.cp.get_group())
    weight_HR = torch.exp(-decay.slope_H[:, None] * layout.between_R).to(final_RHNN.dtype)
    coming_HNN = torch.einsum("hr,rhnm->hnm", weight_HR, final_RHNN)
    first = layout.cu_seqlens[1]
    passed_t11 = torch.arange(1, first + 1, device=out_THN.device)[:, None, None]
    fade_tH1 = torch.exp(-decay.slope_H[:, None] * passed_t11).to(final_RHNN.dtype)
    q_tHN = F.silu(qkv_TH3N[:first, :, : out_THN.shape[-1]])
    more_tHN = torch.einsum("thn,hnm->thm", q_tHN * fade_tH1, coming_HNN)
    return torch.cat([out_THN[:first] + more_tHN.to(out_THN.dtype), out_THN[first:]])


def rotary_angles(position_T: Tensor, rotary_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), both (T, 1, R/2). The angles are float64: in float32 they are off by 0.04 rad at position 1M."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=position_T.device) / rotary_dim
    angle_T1r = position_T.double()[:, None, None] * base**-exponent
    return angle_T1r.cos().to(dtype), angle_T1r.sin().to(dtype)


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
    return attend_documents(q_THN, k_TKN, v_TKN, layout.cu_seqlens, layout.cu_keys)
