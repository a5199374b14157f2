"""Presets, and what the configuration refuses."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from trainer.config import ModelConfig, TrainConfig
from trainer.model import parameter_counts


def test_parameter_counts_of_the_presets():
    total, active = parameter_counts(ModelConfig(preset="minimax-text-01"), 200_064)
    assert (round(total / 1e9, 2), round(active / 1e9, 2)) == (456.09, 45.93)
    total, active = parameter_counts(ModelConfig(preset="h100"), 65_536)
    assert (round(total / 1e9, 2), round(active / 1e9, 2)) == (1.02, 0.18)
    total, _ = parameter_counts(ModelConfig(preset="small"), 32_768)
    assert 0.9e8 < total < 1.6e8
    total, _ = parameter_counts(ModelConfig(preset="tiny"), 4096)
    assert 1e6 < total < 3e6


def test_fields_override_the_preset():
    config = ModelConfig(preset="h100", layers=24)
    assert (config.hidden, config.layers, config.experts) == (1024, 24, 16)
    assert [i for i in range(24) if config.is_softmax(i)] == [7, 15, 23]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"heads": 3, "kv_heads": 2}}, "heads .3. must be a multiple of kv_heads .2."),
        ({"model": {"rotary_dim": 33}}, "must be even and at most head_dim"),
        ({"model": {"top_k": 9}}, "top_k .9. must be at most experts .4."),
        ({"schedule": [{"share": 0.5, "lr": 1}]}, "are 0.5 together; they must make 1"),
        ({"schedule": [{"share": 0.5, "tokens": 3, "lr": 1}]}, "share .0.5. or tokens .3., not both; drop one"),
        ({"schedule": [{"lr": 1}, {"lr": 2}]}, "2 phases without share or tokens"),
        ({"schedule": []}, "no phases without"),
        ({"schedule": [{"lr": float("inf")}]}, "finite number"),
        ({"batch_marks": {0: 8}}, "should be greater than 0"),
        ({"keep_every": 150}, "keep_every .150. must be a multiple of checkpoint_steps"),
        ({"stages": {"a": [{"share": 1, "lr": 1, "shape": "exponential"}]}}, "cannot start or end at a learning rate"),
        ({"hidden": 3}, "Extra inputs"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**values)


def test_identity_names_what_is_trained_not_how():
    """Every field is one or the other: a new one must be thought about."""
    how = {"workers": 2, "threads": 3, "keep": 9, "micro_tokens": 512, "shards": "x", "quarantined": "mask", "spike": 1,
           "evaluate_tokens": 1, "evaluate_needles": 0, "max_skipped": 1, "export": False, "parallel": {"cp": 2},
           "cpus_per_worker": 1, "device": "cuda", "checkpointing": "full", "compile": True, "peak_tflops": 1,
           "checkpoint_steps": 50, "keep_every": 100}  # fmt: skip
    what = {"seed": 1, "batch_tokens": 9, "batch_marks": {9: 9}, "model": {"preset": "small"}, "weights": "x",
            "dtype": "bfloat16", "optimizer": {"clip": 2}, "schedule": [{"lr": 1}],
            "stages": {"a": [{"lr": 1}]}}  # fmt: skip
    assert {*how, *what} == TrainConfig.model_fields.keys()
    base = TrainConfig().identity("p")
    assert TrainConfig(**how | {"dtype": "bfloat16"}).identity("p") == TrainConfig(dtype="bfloat16").identity("p")
    others = [TrainConfig(**{key: value}).identity("p") for key, value in what.items()]
    assert len({base, TrainConfig().identity("q"), *others}) == len(what) + 2


def test_config_does_not_import_torch():
    code = "import sys, trainer.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
