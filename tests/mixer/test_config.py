"""The `mix:` section: defaults, the published preset, and one clear line for what cannot be."""

import pytest
from pydantic import ValidationError

from mixer.config import MixConfig
from tests.mixer.corpus import config


def test_preset_is_the_papers_curriculum_and_can_be_overridden():
    mix = MixConfig(preset="minimax-text-01", thresholds={"medium": 10, "long": 20})
    assert [s.context for s in mix.stages] == [8192, 131072, 524288, 1048576]
    assert [s.rope_base for s in mix.stages] == [1e4, 5e6, 1e7, 1e7]
    assert sum(s.tokens for s in mix.stages[1:]) == 358_000_000_000
    assert mix.stages[0].shares is None and mix.stages[3].shares.long == 0.4
    assert mix.thresholds.long == 20
    assert MixConfig(preset="minimax-text-01").thresholds.medium == 32768


def test_the_preset_scaled_down_with_its_late_blend():
    mix = MixConfig(preset="minimax-text-01", scale=1e-6, context_scale=1 / 16, long_qa=["qa", "qb"])
    assert [s.tokens for s in mix.stages] == [11_400_000, 300_000, 32_000, 26_000]
    assert [s.context for s in mix.stages] == [512, 8192, 32768, 65536]
    assert (mix.thresholds.medium, mix.thresholds.long) == (2048, 8192)
    assert [s.blend for s in mix.stages[:1]] == [None] and [s.transition for s in mix.stages] == [0, 0.1, 0.1, 0.1]
    assert mix.stages[3].blend.sources == {"qa": 0.05, "qb": 0.05} and mix.stages[3].blend.last == 0.2
    assert MixConfig.model_validate(mix.model_dump()) == mix


def test_a_tier_given_in_part_keeps_its_other_default():
    tiers = config({"tokens": 1}, tiers={"high": {"cap": 2}}).tiers
    assert (tiers["high"].copies, tiers["high"].cap) == (4, 2)
    assert (tiers["low"].copies, tiers["low"].cap) == (1, 2)


@pytest.mark.parametrize(
    ("stage", "rest", "message"),
    [
        ({"shares": {"short": 0.5, "medium": 0.4}}, {}, "shares 0.5 . 0.4 . 0 = 0.9: they must sum to 1"),
        ({"shares": {"short": 0.5, "long": 0.5}, "context": 149}, {}, "shares.long is 0.5.*150.*context of 149"),
        ({"context": 0}, {}, "stages.0.context"),
        ({"name": "a/b"}, {}, "stages.0.name"),
        ({"name": "held-out"}, {}, "'held-out', which is taken"),
        ({"source_weights": {"web": -1}}, {}, "source_weights.web is -1"),
        ({"source_weights": {"web": 0.7, "books": 0.5}}, {}, "source_weights sum to 1.2: .* must not exceed 1"),
        ({"source_weights": {"web": float("nan")}}, {}, "source_weights.web is nan"),
        ({"transition": 0.1}, {}, "stages.0.transition: the first stage has none before it"),
        ({"blend": {"sources": {}}}, {}, "blend.sources"),
        ({"blend": {"sources": {"qa": 0.1}, "last": 0}}, {}, "blend.last"),
        ({}, {"scale": 0.5}, "scale is for a preset: set preset to one of minimax-text-01"),
        ({}, {"preset": "minimax-text-01", "scale": "much", "stages": []}, "scale"),
        ({"long_documents": "crop"}, {}, "split"),
        ({"kontext": 3}, {}, "kontext"),
        ({"context": 30_000}, {}, "shard_tokens is 20000, less than one sequence"),
        ({}, {"thresholds": {"medium": 5, "long": 5}}, "medium must be smaller"),
        ({}, {"tiers": {"top": {"cap": 2}}}, "tiers.top: no such tier; the tiers are low, medium, high"),
        ({}, {"tiers": {"low": {"cap": 0}}}, "tiers.low.cap"),
        ({}, {"preset": "minimax-02"}, "minimax-text-01"),
    ],
)
def test_mistakes_are_named(stage, rest, message):
    with pytest.raises(ValidationError, match=rf"(?s){message}"):
        config({"tokens": 100} | stage, **rest)


def test_two_stages_need_two_names_also_where_case_is_ignored():
    with pytest.raises(ValidationError, match="give every stage its own name"):
        config({"tokens": 1, "name": "a"}, {"tokens": 1, "name": "A"})
