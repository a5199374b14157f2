"""Ring attention over packed documents: keys and values go from rank to rank, and none holds those of the whole stream.

Slices are contiguous, so only a slice's first document has keys on ranks before, and its queries see all of those. So a
rank computes its own slice, and then one product without a mask for each block that comes by. The parts are merged by
their log-sum-exp. Backward, each block's gradients follow from the whole's output and log-sum-exp, as in flash
attention, and travel with the block until it is home.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.varlen_attention import Cuts, attend, attend_backward

if TYPE_CHECKING:
    from trainer.attention import Layout


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
