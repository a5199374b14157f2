"""Routing, token drop and grouped products against plain loops; recomputation that must not route again."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from kernels.grouped import grouped_linear, grouped_outer
from trainer import moe
from trainer.attention import Layout
from trainer.config import ModelConfig
from trainer.moe import MoE, heaviest, route, router_metrics, shared_allowance
from trainer.recompute import ALWAYS, operators

F64 = torch.float64
seeds = st.integers(0, 10_000)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def mixture(seed=0, **values):
    config = ModelConfig(hidden=8, ffn=12, experts=4, **values)
    layer = MoE(config).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator(seed + p.ndim), dtype=F64))
    return layer


def groups_of(group):
    return Layout.of([0, len(group)], 4, group_T=torch.tensor(group), groups=3)


def by_hand(layer, x, group):
    """The output and what is computed, one token and one expert at a time."""
    config = layer.config
    prob = (x @ layer.gate.weight.T).softmax(-1)
    wanted = []  # (group, expert, -weight, token)
    for t, g in enumerate(group):
        if g >= 0:
            best = prob[t].argsort(descending=True)[: config.top_k].tolist()
            total = sum(prob[t, e] for e in best)
            wanted += [(g, e, -(prob[t, e] / total), t) for e in best]
    out, load = torch.zeros_like(x), [0] * config.experts
    for g in {g for g in group if g >= 0}:
        limit = math.ceil(group.count(g) * config.top_k * config.capacity_factor / config.experts)
        limit = len(group) if config.capacity == "none" else limit
        for e in range(config.experts):
            for _, _, weight, t in sorted((w for w in wanted if w[:2] == (g, e)), key=lambda w: (w[2], w[3]))[:limit]:
                gate, up = layer.experts.gate_up_proj[e] @ x[t]
                out[t] += -weight * (layer.experts.down_proj[e] @ (F.silu(gate) * up))
                load[e] += 1
    return out, load


@given(seeds, st.lists(st.integers(-1, 2), min_size=1, max_size=30), st.sampled_from([None, 0.3, 0.7, 1.0, 4.0]))
def test_the_mixture_by_hand(seed, group, factor):
    group = sorted(group)
    values = {} if factor is None else {"capacity": "group", "capacity_factor": factor}
    layer = mixture(seed, **values)
    x = torch.randn(len(group), 8, generator=generator(seed), dtype=F64)
    out, routing = layer(x, groups_of(group))
    expected, load = by_hand(layer, x, group)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    assert routing.load_E.tolist() == load
    prob = (x @ layer.gate.weight.T).softmax(-1)
    for g in range(3):
        inside = torch.tensor(group) == g
        torch.testing.assert_close(routing.prob_GE[g], prob[inside].sum(0))
        assert routing.count_GE[g].sum() == inside.sum() * layer.config.top_k
    real = torch.tensor(group) >= 0
    torch.testing.assert_close(routing.entropy, -(prob * prob.log())[real].sum())
    assert not out[~real].any()


def test_ties_go_to_the_first():
    weight, expert = torch.full((5, 1), 0.5), torch.tensor([[1], [0], [1], [1], [1]])
    kept = heaviest(weight, expert, torch.tensor([[0], [0], [-1], [0], [0]]), torch.tensor([[5, 2]]))
    assert kept.flatten().tolist() == [True, True, False, True, False]


@given(seeds, st.integers(1, 6))
def test_shared_capacity_is_used_up_and_takes_from_none(seed, ranks):
    count, own = torch.randint(0, 9, (2, ranks, 4), generator=generator(seed))
    allowed = shared_allowance(count, own)
    kept = torch.minimum(count, allowed)
    assert (kept >= torch.minimum(count, own)).all()
    assert torch.equal(kept.sum(0), torch.minimum(count.sum(0), own.sum(0)))


@given(seeds, st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 4))
def test_grouped_products_and_their_gradients(seed, counts, beyond):
    x = torch.randn(sum(counts) + beyond, 3, generator=generator(seed), dtype=F64, requires_grad=True)
    weight = torch.randn(len(counts), 4, 3, generator=generator(seed + 1), dtype=F64, requires_grad=True)
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    expected = torch.einsum("soi,si->so", weight[expert], x[: sum(counts)])
    out = grouped_linear(x, weight, torch.tensor(counts))
    assert not out[sum(counts) :].any()
    torch.testing.assert_close(out[: sum(counts)], expected)
    g = torch.randn(out.shape, generator=generator(seed + 2), dtype=F64)
    found = torch.autograd.grad(out, (x, weight), g)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, weight), g[: sum(counts)]))


def test_operators_keep_what_they_promise_to_the_compiler():
    x, y, count = torch.randn(6, 3, requires_grad=True), torch.randn(6, 4), torch.tensor([2, 0, 3])
    torch.library.opcheck(grouped_linear, (x, torch.randn(3, 4, 3, requires_grad=True), count))
    torch.library.opcheck(grouped_outer, (y, x.detach(), count))
    probabilities, group = torch.rand(6, 4).softmax(-1), torch.tensor([0, 0, 0, 1, 1, -1])
    for capacity in ("none", "group", "ep_group"):
        torch.library.opcheck(route, (probabilities, group, 2, 2, capacity, 0.5, ""))


def test_recomputation_reuses_the_routing(monkeypatch):
    layer, x = mixture(capacity="group"), torch.randn(20, 8, dtype=F64, requires_grad=True)
    layout = groups_of([0] * 10 + [1] * 10)
    expected = torch.autograd.grad(layer(x, layout)[0].square().sum(), (x, *layer.parameters()))
    calls, real = [], moe.heaviest
    monkeypatch.setattr(moe, "heaviest", lambda *a: calls.append(1) or real(*a))
    contexts = partial(create_selective_checkpoint_contexts, operators(ALWAYS))
    out, _ = checkpoint(layer, x, layout, use_reentrant=False, context_fn=contexts)
    assert len(calls) == 1
    for a, b in zip(torch.autograd.grad(out.square().sum(), (x, *layer.parameters())), expected, strict=True):
        assert torch.equal(a, b)
    assert len(calls) == 1


def test_router_metrics():
    found = router_metrics(torch.tensor([[2, 1, 1, 0], [2, 2, 2, 2]]), torch.tensor([3.0, 1.0], dtype=F64), 4, 2)
    assert found["expert_load"] == [[2, 1, 1, 0], [1, 1, 1, 1]]
    assert found["drop_rate"] == pytest.approx(4 / 16) and found["router_entropy"] == pytest.approx(0.5)
