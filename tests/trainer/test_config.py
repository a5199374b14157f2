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
        ({"batch_marks": {0: 8}}, "must be above 0"),
        ({"keep_every": 150}, "no multiple of checkpoint_steps .100."),
        ({"stages": {"a": [{"share": 1, "lr": 1, "shape": "exponential"}]}}, "cannot start or end at a learning rate"),
        ({"hidden": 3}, "Extra inputs"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**values)


def test_identity_names_what_is_trained_not_how():
    base = TrainConfig()
    assert base.identity("p") == TrainConfig(workers=2, threads=3, keep=9, micro_tokens=512).identity("p")
    others = [TrainConfig(seed=1), TrainConfig(batch_tokens=9), TrainConfig(model=ModelConfig(preset="small"))]
    assert len({base.identity("p"), base.identity("q"), *(c.identity("p") for c in others)}) == 5


def test_config_does_not_import_torch():
    code = "import sys, trainer.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
