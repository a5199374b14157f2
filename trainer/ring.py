"""Ring attention over packed documents: keys and values go from rank to rank, and none holds those of the whole stream.

Slices are contiguous, so only a slice's first document has keys on ranks before, and its queries see all of those. So a
rank computes its own slice, and then one product without a mask for each block that comes by. The parts are merged by
their log-sum-exp. Backward, each block's gradients follow from the whole's output and log-sum-exp, as in flash
attention, and travel with the block until it is home. Suffixes: `attention.py`; t, s: queries and keys of a product.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from trainer.attention import Layout

Cuts = list[int]


@torch.compiler.disable
def ring_attention(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: "Layout") -> Tensor:
    """As `attention.softmax_attention`, of this rank's slice. (T, H, N)."""
    out_THN: Tensor = RingAttention.apply(q_THN, k_TKN, v_TKN, layout)
    return out_THN


class RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, layout: "Layout") -> Tensor:
        assert layout.cp is not None
        wide = torch.promote_types(q_THN.dtype, torch.float32)
        both_TKN, out_THN = torch.cat([k_TKN, v_TKN], dim=1), torch.zeros_like(q_THN, dtype=wide)
        lse_TH = out_THN.new_full(out_THN.shape[:2], -torch.inf)
        both = both_TKN
        for step in range(layout.cp.size()):
            both = passed_on(both, layout) if step else both
            for rows, keys, cu_q, cu_k in meetings(layout, step):
                out, lse = attend(q_THN[rows], both[keys], cu_q, cu_k, step == 0)
                total = torch.logaddexp(lse_TH[rows], lse)
                old, new = torch.exp(lse_TH[rows] - total)[..., None], torch.exp(lse - total)[..., None]
                out_THN[rows], lse_TH[rows] = out_THN[rows] * old + out * new, total
        out_THN = out_THN.to(q_THN.dtype)
        ctx.save_for_backward(q_THN, both_TKN, out_THN, lse_TH)
        ctx.layout = layout
        return out_THN

    @staticmethod
    def backward(ctx: Any, grad_THN: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_THN, both, out_THN, lse_TH = ctx.saved_tensors
        layout, grad_q = ctx.layout, torch.zeros_like(q_THN, dtype=lse_TH.dtype)
        grad_both = torch.zeros_like(both, dtype=lse_TH.dtype)
        for step in range(layout.cp.size()):
            if step:
                both, grad_both = passed_on(both, layout), passed_on(grad_both, layout)
            for rows, keys, cu_q, cu_k in meetings(layout, step):
                whole = grad_THN[rows].contiguous(), out_THN[rows], lse_TH[rows]
                dq, dboth = attend_backward(*whole, q_THN[rows], both[keys], cu_q, cu_k, step == 0)
                grad_q[rows] += dq
                grad_both[keys] += dboth
        grad_k, grad_v = passed_on(grad_both, layout).to(both.dtype).chunk(2, dim=1)  # once round: home
        return grad_q.to(q_THN.dtype), grad_k, grad_v, None


def meetings(layout: "Layout", step: int) -> list[tuple[slice, slice, Cuts, Cuts]]:
    """Which of this rank's queries attend to which keys of the block that began `step` ranks before it, and where
    documents start in both."""
    tokens = layout.part.stop - layout.part.start
    if step == 0:
        return [(slice(0, tokens), slice(0, tokens), layout.cu_seqlens, layout.cu_seqlens)]
    block = layout.part.start - step * tokens
    first, queries = max(0, layout.keys.start - block), layout.cu_seqlens[1]
    if block < 0 or first >= tokens:
        return []
    return [(slice(0, queries), slice(first, tokens), [0, queries], [0, tokens - first])]


def passed_on(x: Tensor, layout: "Layout") -> Tensor:
    """Give x to the next rank; what the one before gave."""
    assert layout.cp is not None
    group = layout.cp.get_group()
    out, rank, ranks = torch.empty_like(x), group.rank(), group.size()
    send = dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=(rank + 1) % ranks)
    receive = dist.P2POp(dist.irecv, out, group=group, group_peer=(rank - 1) % ranks)
    for work in dist.batch_isend_irecv([send, receive]):
        work.wait()
    return out


def attend(q_tHN: Tensor, both_sKN: Tensor, cu_q: Cuts, cu_k: Cuts, causal: bool) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp (t, H)) of each document's queries over its keys."""
    k_sHN, v_sHN = repeated(both_sKN, q_tHN.shape[1])
    if q_tHN.is_cuda:
        out_tHN, lse_Ht, _ = torch.ops.torch_attn._varlen_attn(q_tHN, k_sHN, v_sHN, *on_device(cu_q, cu_k), causal)
        return out_tHN, lse_Ht.mT
    documents = zip(*apart(cu_q, q_tHN), *apart(cu_k, k_sHN, v_sHN), strict=True)
    found = [torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*x, 0.0, causal) for x in documents]
    out_tHN, lse_tH = (torch.cat([x[0].transpose(0, 1) for x in part]) for part in zip(*found, strict=True))
    return out_tHN, lse_tH


def attend_backward(
    grad_tHN: Tensor, out_tHN: Tensor, lse_tH: Tensor, q_tHN: Tensor, both_sKN: Tensor, cu_q: Cuts, cu_k: Cuts,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of q and both, where these keys are some of those whose output and log-sum-exp are given."""
    k_sHN, v_sHN = repeated(both_sKN, q_tHN.shape[1])
    if q_tHN.is_cuda:
        random = torch.zeros(2, dtype=torch.uint64, device=q_tHN.device)  # no dropout
        dq_tHN, *dkv = torch.ops.torch_attn._varlen_attn_backward(
            grad_tHN, q_tHN, k_sHN, v_sHN, out_tHN, lse_tH.mT.contiguous(), *on_device(cu_q, cu_k), causal, random
        )
    else:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads, queries, outs, lses = apart(cu_q, grad_tHN, q_tHN, out_tHN, lse_tH)
        documents = zip(grads, queries, *apart(cu_k, k_sHN, v_sHN), outs, lses, strict=True)
        found = [backward(*x, 0.0, causal) for x in documents]
        dq_tHN, *dkv = (torch.cat([x[0].transpose(0, 1) for x in part]) for part in zip(*found, strict=True))
    return dq_tHN, torch.cat([x.unflatten(1, (both_sKN.shape[1] // 2, -1)).sum(2) for x in dkv], dim=1)


def repeated(both_sKN: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values, for every query head."""
    k_sHN, v_sHN = both_sKN.repeat_interleave(2 * heads // both_sKN.shape[1], dim=1).chunk(2, dim=1)
    return k_sHN, v_sHN


def apart(cu: Cuts, *xs: Tensor) -> list[list[Tensor]]:
    """Each of them by document, as (1, H, ...)."""
    lengths = [b - a for a, b in pairwise(cu)]
    return [[part.transpose(0, 1)[None] for part in x.split(lengths)] for x in xs]


def on_device(cu_q: Cuts, cu_k: Cuts) -> tuple[Tensor, Tensor, int, int]:
    cuts = [torch.tensor(cu, dtype=torch.int32, device="cuda") for cu in (cu_q, cu_k)]
    longest = [max(b - a for a, b in pairwise(cu)) for cu in (cu_q, cu_k)]
    return cuts[0], cuts[1], longest[0], longest[1]
