"""The decoder against `transformers`: an exported checkpoint is loaded there and must compute the same."""

import pytest
import torch
from transformers import MiniMaxForCausalLM

from trainer.attention import Layout
from trainer.checkpoint import Progress, Saver
from trainer.config import ModelConfig, TrainConfig
from trainer.hf import export, head_order
from trainer.moe import balance_loss
from trainer.parallel import build_model, build_optimizer, world

VOCABULARY = 128
MODELS = {
    "hybrid": ModelConfig(hidden=64, heads=4, kv_heads=2, head_dim=16, rotary_dim=8, ffn=96, block=16),
    "one layer": ModelConfig(
        hidden=64, heads=4, kv_heads=2, head_dim=16, rotary_dim=4, ffn=96, layers=1, softmax_every=1
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(our decoder with random weights, the same exported and loaded by transformers)."""
    path = tmp_path_factory.mktemp("export")
    config = TrainConfig(model=MODELS[request.param])
    with world(config) as ranks:
        model = build_model(config, VOCABULARY, 1e4, ranks)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.to_local().add_(0.05 * torch.randn(p.shape, generator=generator))
        about = {"config": config.model_dump(mode="json"), "vocabulary": VOCABULARY, "rope_base": 1e4}
        about |= {"context": 512, "eos": 0}
        saver, progress = Saver(ranks, keep=1), Progress("s")
        saver.save(path, model, build_optimizer(config, model), progress, about)
        saver.wait()
        export(path / progress.checkpoint, path / "hf")
        theirs, loading = MiniMaxForCausalLM.from_pretrained(path / "hf", output_loading_info=True)
        assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
        assert all("decay" in key or "slope" in key for key in loading["missing_keys"])
        theirs.set_experts_implementation("eager")
        yield model, theirs.train()


def as_ours(name, gradient, config):
    """A transformers gradient under our name and with our order of head dimensions."""
    name = name.removeprefix("model.")
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = gradient.unflatten(0, (-1, config.head_dim))
        gradient = torch.empty_like(heads).index_copy_(1, torch.tensor(head_order(config)), heads).flatten(0, 1)
    return name, gradient


@pytest.mark.parametrize("length", [5, 15, 16, 33, 200])
def test_logits_and_gradients(pair, length):
    ours, theirs = pair
    token = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))
    target = torch.cat([token[1:], torch.tensor([-100])])
    layout = Layout.of([0, length], ours.config.block)
    ours.zero_grad()  # before any forward pass: after one, FSDP shows other parameters
    theirs.zero_grad()
    logits = ours(token, layout).logits_TV
    expected = theirs(token[None], use_cache=False).logits[0]
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert (logits.softmax(-1) - expected.softmax(-1)).abs().max() <= 1e-5

    ours(token, layout, target).loss_sum.backward()
    torch.nn.functional.cross_entropy(expected, target, reduction="sum").backward()
    wanted = dict(as_ours(name, p.grad, ours.config) for name, p in theirs.named_parameters())
    found = {name: p.grad.full_tensor() for name, p in ours.named_parameters()}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_balance_loss_of_one_layer_is_theirs(pair):
    ours, theirs = pair
    if ours.config.layers > 1:
        pytest.skip("transformers pools the layers")
    token = torch.randint(1, VOCABULARY, (100,))
    out = ours(token, Layout.of([0, 100], ours.config.block))
    expected = theirs(token[None], output_router_logits=True, labels=token[None]).aux_loss
    assert balance_loss(out.count_LE, out.prob_LE, 100).item() * 2 == pytest.approx(expected.item(), rel=1e-5)
