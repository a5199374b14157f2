"""Causal attention of documents one by one, where torch has no kernel for packed ones: on the CPU, and in float32."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_documents(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> Tensor:
    """Queries [cu_queries[i], cu_queries[i + 1]) attend to keys [cu_keys[i], cu_keys[i + 1]).

    The last query to all keys, and so on backwards. (T, H, N). To a compiler it is one operator (on the CPU): a graph
    would otherwise hold the documents of one batch.
    """
    if torch.compiler.is_compiling():
        return attend_op(q_THN, k_TKN, v_TKN, cu_queries, cu_keys)[0]
    out = []
    for queries, keys, causal in documents(cu_queries, cu_keys, q_THN.device):
        q, k, v = heads_first(q_THN[queries], k_TKN[keys], v_TKN[keys])
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **causal)
        out.append(y[0].transpose(0, 1))
    return torch.cat(out)


def documents(
    cu_queries: Tensor, cu_keys: Tensor, device: torch.device
) -> Iterator[tuple[slice, slice, dict[str, Any]]]:
    """Each document's queries and keys, and what makes its attention causal."""
    for queries, keys in zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True):
        many, earlier = queries[1] - queries[0], keys[1] - keys[0] - (queries[1] - queries[0])
        mask = torch.ones(many, many + earlier, dtype=torch.bool, device=device).tril(earlier) if earlier else None
        yield slice(*queries), slice(*keys), {"attn_mask": mask, "is_causal": not earlier}


def heads_first(*x: Tensor) -> tuple[Tensor, ...]:
    return tuple(y.transpose(0, 1)[None] for y in x)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every query head's own keys and values."""
    shared = q.shape[1] // k.shape[1]
    return q, k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)


@torch.library.custom_op("trivium::attend_documents", mutates_args=())
def attend_op(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Also the logarithms of the softmax's sums (T, H), for the backward pass."""
    out, sums = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys, causal in documents(cu_queries, cu_keys, q.device):
        y, logsumexp = FLASH(*grouped(*heads_first(q[queries], k[keys], v[keys])), 0.0, **flash(causal, q))
        out[queries], sums[queries] = y[0].transpose(0, 1), logsumexp[0].T
    return out, sums


@torch.library.custom_op("trivium::attend_documents_backward", mutates_args=())
def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, out: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for queries, keys, causal in documents(cu_queries, cu_keys, q.device):
        own = grouped(*heads_first(q[queries], k[keys], v[keys]))
        given, made = heads_first(grad[queries], out[queries])
        gq, gk, gv = FLASH_BACKWARD(given, *own, made, sums[queries].T[None], 0.0, **flash(causal, q))
        dq[queries] = gq[0].transpose(0, 1)
        for total, part in ((dk, gk), (dv, gv)):
            total[keys] += part[0].unflatten(0, (k.shape[1], -1)).sum(1).transpose(0, 1)
    return dq, dk, dv


def flash(causal: dict[str, Any], q: Tensor) -> dict[str, Any]:
    """The kernel adds its mask."""
    mask = causal["attn_mask"]
    if mask is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    return {"is_causal": causal["is_causal"], "attn_mask": mask}


@attend_op.register_fake
def _(q, k, v, cu_queries, cu_keys):
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@attend_backward.register_fake
def _(grad, q, k, v, cu_queries, cu_keys, out, sums):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


attend_op.register_autograd(
    lambda ctx, grad, _: (*attend_backward(grad, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)
