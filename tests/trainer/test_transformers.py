"""The decoder against `transformers`: exports are loaded there, its own are loaded here, both compute the same."""

import json

import pytest
import torch
from transformers import AutoConfig, MiniMaxConfig, MiniMaxForCausalLM

from dataprep.storage import UserError
from tests.trainer.training import whole
from trainer.attention import Layout
from trainer.checkpoint import Progress, Saver
from trainer.config import ModelConfig, TrainConfig
from trainer.hf import export, head_order, load, read_config
from trainer.model import Decoder
from trainer.moe import balance_loss
from trainer.parallel import build_model, build_optimizer, world

VOCABULARY = 128
MODELS = {
    "hybrid": ModelConfig(hidden=64, heads=4, kv_heads=2, head_dim=16, rotary_dim=8, ffn=96, block=16),
    "one layer": ModelConfig(
        hidden=64, heads=4, kv_heads=2, head_dim=16, rotary_dim=4, ffn=96, layers=1, softmax_every=1
    ),
    "full rotary": ModelConfig(
        hidden=40,
        heads=3,
        kv_heads=1,
        head_dim=12,
        rotary_dim=12,
        ffn=24,
        layers=3,
        softmax_every=2,
        block=7,
        experts=6,
        top_k=3,
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
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        about = {"config": config.model_dump(mode="json"), "vocabulary": VOCABULARY, "rope_base": 1e4}
        about |= {"context": 512, "eos": 0}
        saver, progress = Saver(ranks, keep=1), Progress("s")
        saver.save(path, model, build_optimizer(config, model), progress, about)
        saver.wait()
        checkpoint = path / progress.checkpoint
        export(checkpoint, path / "hf", file_bytes=100_000)
        if config.model.heads == 3:
            with pytest.raises(UserError, match="a power of two heads, not 3"):
                export(checkpoint, path / "released", released=True)
        else:
            export(checkpoint, path / "released", released=True)
            as_vllm_reads_it(path / "released", config.model)
        for layout in ("hf", "released") if (path / "released").exists() else ("hf",):
            again = build_model(config, VOCABULARY, 1e4, ranks)
            load(again, path / layout)
            for name, p in model.named_parameters():
                assert torch.equal(whole(again.get_parameter(name)), whole(p)), name
        assert len(list((path / "hf").glob("*.safetensors"))) > 1
        assert all(f.stat().st_size < 110_000 for f in (path / "hf").glob("*.safetensors"))
        theirs, loading = MiniMaxForCausalLM.from_pretrained(path / "hf", output_loading_info=True)
        assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
        assert all("decay" in key or "slope" in key for key in loading["missing_keys"])
        theirs.set_experts_implementation("eager")
        yield model, theirs.train()


def as_vllm_reads_it(path, model):
    """The fields and names that vLLM's `minimax_text_01.py` reads (at 98370df), by `transformers`' class as it does."""
    config = AutoConfig.from_pretrained(path)
    assert config.architectures == ["MiniMaxText01ForCausalLM"] and config.postnorm
    assert config.attn_type_list == [int(model.is_softmax(i)) for i in range(model.layers)]
    assert config.layer_types == ["full_attention" if full else "linear_attention" for full in config.attn_type_list]
    assert config.rope_parameters["rope_theta"] == 1e4 and config.rope_parameters["rope_type"] == "default"
    for name, value in {
        "rotary_dim": model.rotary_dim, "head_dim": model.head_dim, "hidden_size": model.hidden,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "vocab_size": VOCABULARY,
        "num_hidden_layers": model.layers, "intermediate_size": model.ffn, "num_local_experts": model.experts,
        "num_experts_per_tok": model.top_k, "rms_norm_eps": model.norm_eps, "max_position_embeddings": 512,
        "shared_intermediate_size": 0, "pad_token_id": None, "sliding_window": None,
    }.items():  # fmt: skip
        assert getattr(config, name) == value, name
    for kind in ("full_attention", "linear_attention", "mlp"):
        assert getattr(config, f"layernorm_{kind}_alpha") == pytest.approx((2 * model.layers) ** 0.25)
        assert getattr(config, f"layernorm_{kind}_beta") == 1.0
    names = set(json.loads((path / "model.safetensors.index.json").read_text())["weight_map"])
    full, linear = ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "output_gate", "out_proj", "norm"})
    expected = {"model.embed_tokens", "model.norm", "lm_head"}
    for i in range(model.layers):
        parts = {f"self_attn.{part}" for part in (full if model.is_softmax(i) else linear)}
        parts |= {"input_layernorm", "post_attention_layernorm", "block_sparse_moe.gate"}
        parts |= {f"block_sparse_moe.experts.{e}.w{w}" for e in range(model.experts) for w in (1, 2, 3)}
        expected |= {f"model.layers.{i}.{part}" for part in parts}
    assert names == {f"{name}.weight" for name in expected}


def as_ours(name, gradient, config):
    """A transformers gradient under our name and with our order of head dimensions."""
    name = name.removeprefix("model.")
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = gradient.unflatten(0, (-1, config.head_dim))
        gradient = torch.empty_like(heads).index_copy_(1, torch.tensor(head_order(config)), heads).flatten(0, 1)
    if name.endswith("gate_up_proj"):
        gradient = gradient.unflatten(1, (2, -1))
    return name, gradient


@pytest.mark.parametrize("length", [5, 15, 16, 33, 200])
def test_logits_and_gradients(pair, length):
    ours, theirs = pair
    token = torch.randint(1, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length))
    target = torch.cat([token[1:], torch.tensor([-100])])
    layout = Layout.of([0, length], ours.config.block)
    ours.zero_grad()
    theirs.zero_grad()
    logits = ours(token, layout).logits_TV
    expected = theirs(token[None], use_cache=False).logits[0]
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert (logits.softmax(-1) - expected.softmax(-1)).abs().max() <= 1e-5

    ours(token, layout, target).loss_sum.backward()
    torch.nn.functional.cross_entropy(expected, target, reduction="sum").backward()
    wanted = dict(as_ours(name, p.grad, ours.config) for name, p in theirs.named_parameters())
    found = {name: whole(p.grad) for name, p in ours.named_parameters()}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_balance_loss_of_one_layer_is_theirs(pair):
    ours, theirs = pair
    if ours.config.layers > 1:
        return  # transformers pools the layers
    token = torch.randint(1, VOCABULARY, (100,))
    out = ours(token, Layout.of([0, 100], ours.config.block))
    expected = theirs(token[None], output_router_logits=True, labels=token[None]).aux_loss
    balance = balance_loss(out.routing.count_GE, out.routing.prob_GE, 100)
    assert balance.item() * 2 == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture
def theirs(tmp_path):
    """A model that transformers has made and saved, every head dimension rotated."""
    factors = {f"{kind}_alpha_factor": 8**0.25 for kind in ("full_attn", "linear_attn", "mlp")}
    config = MiniMaxConfig(
        vocab_size=VOCABULARY, hidden_size=40, intermediate_size=24, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, num_local_experts=4, max_position_embeddings=256, block_size=16,
        layer_types=["linear_attention", "full_attention"] * 2, **factors,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MiniMaxForCausalLM(config)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_their_checkpoint_is_loaded(theirs):
    model, path = theirs
    config, about = read_config(path)
    ours = Decoder(config, about["vocabulary"], about["rope_base"])
    load(ours, path)
    token = torch.randint(1, VOCABULARY, (50,))
    expected = model(token[None], use_cache=False).logits[0]
    logits = ours(token, Layout.of([0, 50], config.block)).logits_TV
    assert (logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_alpha_factor": 1.0}, "mlp_alpha_factor is 1.0, but this decoder computes with 1.68"),
        ({"mlp_beta_factor": 0.5}, "mlp_beta_factor is 0.5, but this decoder computes with 1.0"),
        ({"layer_types": ["full_attention", "linear_attention"] * 2}, "layer_types is"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"hidden_size": None, "layer_types": None}, "is not that of a MiniMax decoder"),
        ({"hidden_size": 80}, "train.model.hidden is 40, but .* has 80"),
        ({"vocab_size": 99}, "vocabulary has 128 entries, but that of .* 99"),
    ],
)
def test_what_this_decoder_cannot_compute_is_refused(theirs, changes, message):
    _, path = theirs
    config, _ = read_config(path)
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=message):
        load(Decoder(config, VOCABULARY, 1e4), path)
