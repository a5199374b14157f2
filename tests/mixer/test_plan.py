"""Plans: hard targets exact, caps, who chooses first, and what is told when a recipe cannot be had."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataprep.storage import UserError
from mixer.inventory import BUCKETS, add_inventories
from mixer.plan import Plan
from mixer.planner import make_plan
from tests.mixer.corpus import config, corpus, planned

SHARES = {"short": 0.3, "medium": 0.3, "long": 0.4}


def inventory(cells, stages=1):
    """cells: (source, tier, class, tokens[, held out]), one document each."""
    rows = [
        {
            "source": source, "tier": tier, "length_class": length_class, "held_out": bool(held_out), "documents": 1,
            "tokens": tokens, "usable": [tokens] * stages, "buckets": [tokens] + [0] * (BUCKETS - 1),
        }
        for source, tier, length_class, tokens, *held_out in cells
    ]  # fmt: skip
    return add_inventories([{"documents": len(rows), "tokens": 0, "removed": {}, "cells": rows}])


@st.composite
def recipes(draw):
    cell = st.tuples(
        st.sampled_from(["a", "b", "c"]), st.sampled_from(["low", "medium", "high"]),
        st.sampled_from(["short", "medium", "long"]), st.integers(1, 10**12),
    )  # fmt: skip
    cells = draw(st.lists(cell, min_size=1, max_size=15))
    part = st.integers(0, 10)
    names = sorted({c[0] for c in cells})
    weights = (
        st.tuples(*[st.integers(0, 4)] * len(names))
        .filter(any)
        .map(lambda w: {name: x / sum(w) for name, x in zip(names, w, strict=True)})
    )
    stages = []
    for _ in range(draw(st.integers(1, 4))):
        shares = draw(st.none() | st.tuples(part, part, part).filter(any))
        classes = ("short", "medium", "long")
        stages.append(
            {
                "tokens": draw(st.integers(1, 10**12)),
                "shares": shares and {n: s / sum(shares) for n, s in zip(classes, shares, strict=True)},
                "source_weights": draw(st.none() | weights),
            }
        )
    return inventory(cells, len(stages)), config(*stages)


@settings(deadline=None)
@given(recipes())
def test_a_plan_meets_its_targets_exactly_or_is_refused(recipe):
    sums, mix = recipe
    try:
        plan = make_plan(sums, mix)
    except UserError as error:
        assert "are missing" in str(error)
        return
    assert plan == make_plan(sums, mix)
    for spec, stage in zip(mix.stages, plan.stages, strict=True):
        assert sum(cell.planned for cell in stage.cells) == spec.tokens == sum(stage.classes.values())
        if spec.shares:
            for name, tokens in stage.classes.items():
                assert abs(tokens - getattr(spec.shares, name) * spec.tokens) < 1
    for numbers in zip(*(stage.cells for stage in plan.stages), strict=True):
        before = 0.0
        for cell in numbers:
            assert cell.copies_before == before
            before = cell.copies_after
            assert cell.copies_after - cell.copies_before == pytest.approx(cell.planned / cell.usable, abs=1e-9)
        assert before <= mix.tiers[numbers[0].tier].cap


def test_natural_shares_follow_tokens_times_copies_and_source_weights():
    sums = inventory([("a", "high", "short", 1000), ("a", "low", "long", 1000), ("b", "medium", "short", 2000)])
    cells = make_plan(sums, config({"tokens": 1400})).stages[0].cells
    assert {(c.source, c.tier): (c.planned, c.why) for c in cells} == {
        ("a", "high"): (800, "in proportion"),
        ("a", "low"): (200, "in proportion"),
        ("b", "medium"): (400, "in proportion"),
    }
    cells = make_plan(sums, config({"tokens": 1200, "source_weights": {"b": 0}})).stages[0].cells
    assert [(c.planned, c.why) for c in cells if c.source == "b"] == [(0, "weight 0")]


def test_a_cap_binds_and_the_others_take_the_rest():
    sums = inventory([("a", "high", "short", 100), ("a", "medium", "short", 1000)])
    cells = make_plan(sums, config({"tokens": 3000})).stages[0].cells
    assert [(c.tier, c.planned, c.why) for c in cells] == [
        ("high", 400, "cap binds"), ("medium", 2600, "in proportion"),
    ]  # fmt: skip


def test_later_stages_choose_first_and_count_after_the_earlier_ones():
    sums = inventory([("a", "low", "short", 1000), ("a", "low", "long", 1000)], stages=2)
    stages = {"tokens": 2000}, {"tokens": 2000, "shares": {"long": 1.0}}
    main, extension = make_plan(sums, config(*stages)).stages
    assert main.classes == {"short": 2000, "medium": 0, "long": 0}
    assert extension.classes == {"short": 0, "medium": 0, "long": 2000}
    by_class = {c.length_class: (c.copies_before, c.copies_after) for c in extension.cells}
    assert by_class == {"short": (2, 2), "long": (0, 2)}


def test_what_cannot_be_had_is_told_all_at_once_with_what_would_do():
    sums = inventory([("a", "low", "short", 1000), ("a", "high", "long", 100)], stages=2)
    stages = {"tokens": 5000}, {"tokens": 1000, "shares": SHARES}
    with pytest.raises(UserError) as caught:
        make_plan(sums, config(*stages))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2 and not any("short" in line for line in lines)
    assert "stage s1 needs 300 tokens of medium documents; 0 can be drawn" in str(caught.value)
    # Of the long documents' 400 tokens the last stage takes all, of the short ones' 2000 it takes 300.
    assert "stage s0 needs 5000 tokens in all; 1700 can be drawn" in str(caught.value)
    assert "3300 are missing: lower mix.stages.0.tokens to 1700" in str(caught.value)
    with pytest.raises(UserError, match=r"lower mix.stages.0.shares.long to 0.4,"):
        make_plan(sums, config({"tokens": 1000, "shares": {"short": 0.5, "long": 0.5}}, {"tokens": 1}))


def test_an_unknown_source_is_refused():
    with pytest.raises(UserError, match=r"mix.stages.0.source_weights.wbe: no source .* there are web"):
        make_plan(inventory([("web", "low", "short", 10)]), config({"tokens": 1, "source_weights": {"wbe": 2}}))


def test_held_out_documents_are_in_no_stage_and_limited():
    sums = inventory([("a", "low", "short", 100), ("a", "low", "short", 60, True), ("a", "high", "short", 20, True)])
    plan = make_plan(sums, config({"tokens": 100}, held_out={"tokens": 40}))
    assert [c.available for c in plan.stages[0].cells] == [100]
    assert (plan.held_out.tokens, plan.held_out.classes["short"]) == (40, 40)
    assert [(c.tier, c.planned, c.copies_after) for c in plan.held_out.cells] == [("high", 10, 0.5), ("low", 30, 0.5)]
    assert plan.stage("held-out") is plan.held_out
    with pytest.raises(UserError, match="no stage 'x'; its stages are s0, held-out"):
        plan.stage("x")


def test_a_plan_survives_json_and_notices_another_plans_table():
    plan = planned(corpus(), config({"tokens": 40_000}, {"tokens": 9000, "shares": SHARES}))[1]
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())), plan.places)
    assert again == plan and again.fingerprint == plan.fingerprint
    other = planned(corpus(seed=1), config({"tokens": 40_000}))[1]
    assert other.fingerprint != plan.fingerprint
    with pytest.raises(UserError, match="another plan"):
        Plan.from_json(plan.to_json(), other.places)
