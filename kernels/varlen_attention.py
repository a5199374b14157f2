"""Softmax attention of packed documents: the plain one, and one that tells its log-sum-exp, with its backward.

Shape suffixes: T tokens, H heads, K key/value heads, N head dimension; t, s: queries and keys of a product.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

Cuts = list[int]  # document i is rows [cuts[i], cuts[i + 1])


def attend_documents(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, cu_q: Cuts, cu_k: Cuts) -> Tensor:
    """Each document's queries over its keys, causal, one document after the other: for the CPU, and for float32, where
    torch has no kernel for packed documents. Where a document has more keys, the first are before its queries."""
    out = []
    for q, k, v in zip(*apart(cu_q, q_THN), *apart(cu_k, k_TKN, v_TKN), strict=True):
        earlier = k.shape[2] - q.shape[2]
        mask = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(earlier) if earlier else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not earlier, enable_gqa=True)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)


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
    """Each of them by document, as (1, H, ...). Not by slices: the gradient of each would be as long as the stream."""
    lengths = [b - a for a, b in pairwise(cu)]
    return [[part.transpose(0, 1)[None] for part in x.split(lengths)] for x in xs]


def on_device(cu_q: Cuts, cu_k: Cuts) -> tuple[Tensor, Tensor, int, int]:
    cuts = [torch.tensor(cu, dtype=torch.int32, device="cuda") for cu in (cu_q, cu_k)]
    longest = [max(b - a for a, b in pairwise(cu)) for cu in (cu_q, cu_k)]
    return cuts[0], cuts[1], longest[0], longest[1]
