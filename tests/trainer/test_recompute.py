"""Checkpointing changes memory, not numbers; the routing is not computed again; compiled layers are one graph."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.trainer.training import CONFIG
from trainer import attention, recompute
from trainer.attention import Layout
from trainer.parallel import build_model, world

CUTS = [0, 40, 41, 100]


def step(config, cuts, ranks, model=None):
    """(loss, gradients) of one pass on one process."""
    model = model or build_model(config, 50, 1e4, ranks)
    model.zero_grad()
    token = torch.arange(cuts[-1]) % 50
    out = model(token, Layout.of(cuts, config.model.block), token.roll(-1))
    out.loss_sum.backward()
    return out.loss_sum.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["selective", "full"])
def test_checkpointing_gives_the_same_bits(how):
    with world(CONFIG) as ranks:
        loss, gradients = step(CONFIG, CUTS, ranks)
        other, others = step(CONFIG.model_copy(update={"checkpointing": how}), CUTS, ranks)
    assert torch.equal(loss, other) and gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_a_long_stream_in_parts(monkeypatch):
    """Parts end where documents do; loss and gradients are those of the whole."""
    config = CONFIG.model_copy(update={"checkpointing": "full"})
    cuts = [0, 3, 50, 60, 90, 170, 171, 230]
    with world(config) as ranks:
        loss, gradients = step(config, cuts, ranks)
        monkeypatch.setattr(attention, "PART", 40)
        layout = Layout.of(cuts, config.model.block)
        assert [(p.start, p.stop) for p, _ in layout.parts] == [(0, 50), (50, 90), (90, 170), (170, 230)]
        other, others = step(config, cuts, ranks)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).norm() <= 1e-9 * gradient.norm(), name


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[name] = self.seen.get(name := func._schema.name, 0) + 1
        return func(*args, **(kwargs or {}))


def saved(config):
    """Bytes kept for the backward pass, by one forward pass; and the operators' calls in the backward pass."""
    with world(config) as ranks:
        model = build_model(config, 50, 1e4, ranks)
        token = torch.arange(512) % 50
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(token, Layout.of([0, 512], config.model.block), token.roll(-1))
        with Calls() as calls:
            out.loss_sum.backward()
        return sum(storages.values()), calls.seen


def test_what_is_computed_again():
    none, selective, full = (
        saved(CONFIG.model_copy(update={"checkpointing": how})) for how in ("none", "selective", "full")
    )
    assert full[0] < selective[0] + 1 and full[0] < none[0] / 3
    for kept in ("aten::topk", "aten::_scaled_dot_product_flash_attention_for_cpu"):
        assert not any(kept in calls for _, calls in (none, selective, full))
    assert full[1]["aten::mm"] > selective[1]["aten::mm"] == none[1]["aten::mm"]
    assert selective[1]["aten::silu"] > none[1].get("aten::silu", 0)


@pytest.mark.parametrize("how", ["none", "selective"])
def test_compiled_layers_are_one_graph(how, monkeypatch):
    """`fullgraph` raises at a break. All lightning layers (on the CPU the others are not compiled) share one graph."""
    monkeypatch.setattr(recompute, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = CONFIG.model_copy(update={"dtype": "float32"})
    config = plain.model_copy(update={"compile": True, "checkpointing": how})
    with world(config) as ranks:
        model = build_model(config, 50, 1e4, ranks)
        for cuts in (CUTS, [0, 3, 50, 60, 90, 100], [0, 100], [0, *range(9, 100, 7), 100]):
            expected, gradients = step(plain, cuts, ranks)
            loss, found = step(config, cuts, ranks, model)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
            for name, gradient in gradients.items():
                assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
