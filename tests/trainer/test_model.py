"""The whole decoder: packed documents against each alone, initialisation."""

import itertools
import math

import pytest
import torch

from trainer.attention import Layout
from trainer.config import ModelConfig
from trainer.model import Decoder, initialise
from trainer.moe import balance_loss

CONFIG = ModelConfig(hidden=32, heads=2, kv_heads=1, head_dim=16, rotary_dim=8, ffn=24, block=8)


def model(config=CONFIG, seed=0):
    decoder = Decoder(config, 50, 1e4)
    initialise(decoder, seed)
    return decoder.double()


def test_packed_documents_equal_each_alone():
    decoder = model()
    lengths = [1, 7, 8, 30, 3, 17]
    tokens = torch.randint(0, 50, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1)
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    packed = decoder(tokens, Layout.of(cu, CONFIG.block), targets)
    packed.loss_sum.backward()
    gradients = {name: p.grad.clone() for name, p in decoder.named_parameters()}
    decoder.zero_grad()
    alone = [decoder(tokens[a:b], Layout.of([0, b - a], CONFIG.block), targets[a:b]) for a, b in itertools.pairwise(cu)]
    torch.testing.assert_close(packed.nll_T, torch.cat([out.nll_T for out in alone]), rtol=1e-9, atol=0)
    sum(out.loss_sum for out in alone).backward()
    for name, p in decoder.named_parameters():
        assert (gradients[name] - p.grad).norm() <= 1e-9 * p.grad.norm(), name
    assert torch.equal(packed.routing.count_GE, sum(out.routing.count_GE for out in alone))


def test_padding_changes_nothing_and_is_not_counted():
    decoder = model()
    tokens = torch.arange(20) % 50
    real = torch.arange(20) < 13
    layout = Layout.of([0, 13, 20], CONFIG.block, group_T=torch.where(real, 0, -1))
    padded = decoder(tokens, layout, torch.where(real, 5, -100))
    alone = decoder(tokens[:13], Layout.of([0, 13], CONFIG.block), torch.full((13,), 5))
    torch.testing.assert_close(padded.loss_sum, alone.loss_sum, rtol=1e-12, atol=0)
    torch.testing.assert_close(padded.routing.prob_GE, alone.routing.prob_GE, rtol=1e-9, atol=0)
    assert torch.equal(padded.routing.count_GE, alone.routing.count_GE) and not padded.nll_T[13:].any()


def test_balance_loss_is_one_per_layer_when_even_and_adds_up():
    count, prob = torch.full((3, 1, 4), 10), torch.full((3, 1, 4), 5.0)
    assert balance_loss(count, prob, 20).item() == pytest.approx(3)
    one_favourite = balance_loss(torch.tensor([[[20, 20, 0, 0]]]), torch.tensor([[[10.0, 10, 0, 0]]]), 20)
    assert one_favourite.item() == pytest.approx(2)
    parts = [balance_loss(count, p, 20) for p in (prob * 0.25, prob * 0.75)]
    assert sum(parts).item() == pytest.approx(3)


def test_initial_weights_are_xavier_with_deepnorm_gains():
    config = ModelConfig(hidden=256, heads=4, kv_heads=4, head_dim=64, rotary_dim=32, ffn=256)
    decoder = Decoder(config, 512, 1e4)
    initialise(decoder, 0)
    small = (8 * 8) ** -0.25
    xavier = math.sqrt(2 / (256 + 256))
    q, k, v = decoder.layers[0].self_attn.qkv_proj.weight.view(4, 3, 64, 256).unbind(1)
    experts = decoder.layers[0].mlp.experts
    softmax = decoder.layers[7].self_attn
    for matrix, expected in [
        (q, xavier), (k, xavier), (v, xavier * small), (softmax.q_proj.weight, xavier),
        (softmax.v_proj.weight, xavier * small), (softmax.o_proj.weight, xavier * small),
        (decoder.layers[0].self_attn.output_gate.weight, xavier),
        (decoder.layers[0].self_attn.out_proj.weight, xavier * small), (experts.down_proj[2], xavier * small),
        (experts.gate_up_proj[1, 0], xavier * small), (decoder.lm_head.weight, math.sqrt(2 / (512 + 256))),
    ]:  # fmt: skip
        assert matrix.std().item() == pytest.approx(expected, rel=0.02)
        assert abs(matrix.mean().item()) < 0.01 * expected * 3
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])
    assert (decoder.norm.weight == 1).all()


def test_initial_weights_depend_on_seed_and_name():
    same, other = model(seed=0), model(seed=1)
    assert torch.equal(model().lm_head.weight, same.lm_head.weight)
    assert not torch.equal(same.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(same.layers[0].self_attn.out_proj.weight, same.layers[1].self_attn.out_proj.weight)
