"""Presets, the learning-rate schedule, and what the configuration refuses."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.config import ModelConfig, Phase, TrainConfig
from trainer.model import parameter_counts
from trainer.schedule import learning_rate


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


def test_the_papers_schedule():
    """500 steps of warm-up to 2e-4, 7.2 T tokens there, 3.2 T at 1.3e-4, then 1 T down to 3e-5 exponentially."""
    tokens = 11.4e12
    phases = (
        Phase(share=8e9 / tokens, lr=2e-4),
        Phase(share=7.192e12 / tokens, lr=2e-4, shape="constant"),
        Phase(share=3.2e12 / tokens, lr=1.3e-4, shape="constant"),
        Phase(share=1e12 / tokens, lr=3e-5, shape="exponential"),
    )
    (schedule,) = (TrainConfig(schedule=phases).schedule,)
    points = {4e9: 1e-4, 8e9: 2e-4, 5e12: 2e-4, 7.3e12: 1.3e-4, 10.3e12: 1.3e-4, 11.4e12: 3e-5}
    points[10.9e12] = (1.3e-4 * 3e-5) ** 0.5  # halfway down, the geometric mean
    for at, expected in points.items():
        assert learning_rate(schedule, at / tokens) == pytest.approx(expected, rel=1e-6)


@given(st.floats(0, 1))
def test_default_schedule_rises_then_falls(progress):
    schedule = TrainConfig().schedule
    lr = learning_rate(schedule, progress)
    assert 0 <= lr <= schedule[0].lr
    peak = schedule[0].share
    later = learning_rate(schedule, min(1.0, progress + 0.01))
    assert later >= lr if progress + 0.01 <= peak else later <= lr or progress < peak
    assert learning_rate(schedule, 1.0) == schedule[-1].lr


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"heads": 3, "kv_heads": 2}}, "heads .3. must be a multiple of kv_heads .2."),
        ({"model": {"rotary_dim": 33}}, "must be even and at most head_dim"),
        ({"model": {"top_k": 9}}, "top_k .9. must be at most experts .4."),
        ({"schedule": [{"share": 0.5, "lr": 1}]}, "are 0.5 together; they must make 1"),
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
