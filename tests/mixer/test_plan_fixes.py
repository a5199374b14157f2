"""What is told of a curriculum that cannot be had: what is missing, the nearest plan, changes that are enough."""

import numpy as np
import pytest
import yaml
from hypothesis import assume, given, settings

from dataprep.storage import UserError
from mixer.config import MixConfig
from mixer.feasible import Fix, fixes, nearest
from mixer.planner import make_plan
from tests.mixer.corpus import config
from tests.mixer.recipes import full_size, inventory, problem_of, recipes
from tests.mixer.test_plan import SHARES, most_that_can_be_drawn


def fixes_of(sums, mix) -> list[Fix]:
    cells = [cell for cell in sums["cells"] if not cell["held_out"]]
    return list(fixes(problem_of(sums, mix), cells, sorted({c["source"] for c in sums["cells"]}), mix))


def possible(sums, mix) -> bool:
    return most_that_can_be_drawn(sums, mix) == sum(stage.tokens for stage in mix.stages)


@settings(deadline=None, max_examples=25)
@given(recipes())
def test_every_fix_is_enough_and_a_little_less_is_not(recipe):
    sums, mix = recipe
    p = problem_of(sums, mix)
    planned, missing = nearest(p)
    assume(missing.any())
    drawn = np.array([planned[g.stage][p.group[g.stage] == n].sum() for n, g in enumerate(p.groups)])
    assert (drawn == p.targets - missing).all() and (planned.sum(axis=0) <= p.room).all()
    assert planned.sum() == most_that_can_be_drawn(sums, mix)
    for fix in fixes_of(sums, mix):
        fixed = fix.apply(mix)
        assert possible(sums, fixed)
        make_plan(sums, fixed)
        if fix.path[-1] == "cap":
            assert not possible(sums, Fix(fix.path, fix.value - 2).apply(mix)) or fix.value - 2 < 1
        if fix.path[-1] == "tokens":
            asked = mix.stages[fix.path[1]].tokens
            less = fix.value + max(4, int((asked - fix.value) * 2e-6))
            assert less >= asked or not possible(sums, Fix(fix.path, less).apply(mix))


def test_all_that_is_missing_is_told_at_once_with_the_nearest_plan_and_single_changes():
    sums = inventory([("a", "low", "short", 1000), ("a", "high", "long", 100)], stages=2)
    with pytest.raises(UserError) as caught:
        make_plan(sums, config({"tokens": 5000}, {"tokens": 1000, "shares": SHARES}))
    told = str(caught.value)
    # Of the long documents' 400 tokens the last stage takes all, of the short ones' 2000 it takes 300.
    assert "cannot be had: 3,600 tokens are missing" in told
    assert (
        "stage s0 (mix.stages.0) needs 5,000 tokens of documents of all classes; beside the other stages' 1,700" in told
    )
    assert "needs 300 tokens of medium documents" in told and "no cell that this stage may draw from" in told
    assert "a/low/short: 1,000 tokens x cap 2 = 2,000; drawn: s0 1,700, s1 300" in told
    assert "s1: 700 of 1,000 tokens (short 300, medium 0, long 400)" in told
    assert "no single change of tokens, cap or shares is enough" in told


def test_one_change_of_each_kind():
    sums = inventory([("a", "low", "short", 1000), ("a", "high", "long", 100)])
    mix = config({"tokens": 1000, "shares": {"short": 0.5, "long": 0.5}})
    assert {str(fix) for fix in fixes_of(sums, mix)} == {
        "set mix.stages.0.tokens to 800",
        "set mix.tiers.high.cap to 5",
        "set mix.stages.0.shares to {short: 0.6, medium: 0, long: 0.4}",
    }
    with pytest.raises(UserError, match=r"any one of these changes is enough:\n  set mix\.stages\.0\.tokens to 800"):
        make_plan(sums, mix)
    for fix in fixes_of(sums, mix):  # a value can be pasted into the YAML as it stands
        assert yaml.safe_load(str(fix).split(" to ")[1]) == fix.value


def test_a_share_of_long_documents_is_not_proposed_where_none_fits():
    sums = inventory([("a", "low", "short", 100), ("a", "high", "long", 1000)])
    mix = config({"tokens": 1000, "shares": {"short": 0.5, "medium": 0.5}, "context": 149})
    assert [fix.path[-1] for fix in fixes_of(sums, mix)] == []


def test_the_papers_curriculum_without_enough_text():
    found = fixes_of(full_size(2e12), MixConfig(preset="minimax-text-01"))
    assert [fix.path for fix in found] == [("stages", 0, "tokens"), ("tiers", "medium", "cap")]
