"""Plans: hard targets exact, caps, a verdict that a maximum flow confirms, and what a plan tells of itself."""

import json
import random

import networkx
import numpy as np
import pytest
from hypothesis import given, settings

from dataprep.storage import UserError
from mixer.config import MixConfig
from mixer.plan import Plan
from mixer.planner import make_plan
from tests.mixer.corpus import config, corpus, planned
from tests.mixer.recipes import full_size, inventory, problem_of, recipes

SHARES = {"short": 0.3, "medium": 0.3, "long": 0.4}


def most_that_can_be_drawn(sums, mix: MixConfig) -> int:
    """Independent of the planner: a maximum flow from the hard targets through the cells to the caps."""
    p, graph = problem_of(sums, mix), networkx.DiGraph()
    for g, group in enumerate(p.groups):
        graph.add_edge("from", ("target", g), capacity=group.target)
        for c in np.nonzero(p.allowed[group.stage] & (p.group[group.stage] == g))[0].tolist():
            graph.add_edge(("target", g), ("cell", c))
    for c, (cap, usable) in enumerate(zip(p.cap.tolist(), p.usable[0].tolist(), strict=True)):
        graph.add_edge(("cell", c), "to", capacity=cap * usable)
    return networkx.maximum_flow_value(graph, "from", "to")


@settings(deadline=None, max_examples=40)
@given(recipes())
def test_a_plan_meets_its_targets_exactly_or_is_refused(recipe):
    sums, mix = recipe
    try:
        plan = make_plan(sums, mix)
    except UserError as error:
        assert "are missing" in str(error)
        assert most_that_can_be_drawn(sums, mix) < sum(stage.tokens for stage in mix.stages)
        return
    assert most_that_can_be_drawn(sums, mix) == sum(stage.tokens for stage in mix.stages)
    shuffled = sums | {"cells": random.Random(1).sample(sums["cells"], len(sums["cells"]))}
    assert json.dumps(make_plan(shuffled, mix).to_json()) == json.dumps(plan.to_json())
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


def test_an_unknown_source_is_refused():
    with pytest.raises(UserError, match=r"mix.stages.0.source_weights.wbe: no source .* there are web"):
        make_plan(inventory([("web", "low", "short", 10)]), config({"tokens": 1, "source_weights": {"wbe": 0.2}}))


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


def test_where_stages_can_use_different_parts_of_a_cell_targets_are_exact_and_caps_hold():
    sums = inventory([("a", "low", "short", 1000), ("b", "low", "short", 999), ("a", "high", "long", 700)], stages=2)
    for cell, first in zip(sums["cells"], (300, 333, 701), strict=True):
        cell["usable"] = [min(first, cell["tokens"]), cell["tokens"]]
    plan = make_plan(sums, config({"tokens": 1800}, {"tokens": 3000, "shares": {"short": 0.5, "long": 0.5}}))
    assert [sum(c.planned for c in s.cells) for s in plan.stages] == [1800, 3000]
    assert plan.stages[1].classes == {"short": 1500, "medium": 0, "long": 1500}
    for cell in plan.stages[1].cells:
        assert cell.copies_after <= plan.tiers[cell.tier]["cap"]
    with pytest.raises(UserError, match="are missing"):
        make_plan(sums, config({"tokens": 2500}, {"tokens": 3000, "shares": {"short": 0.5, "long": 0.5}}))


def test_the_papers_curriculum_on_200_sources():
    mix = MixConfig(preset="minimax-text-01", long_qa=["source-007"], tiers={"high": {"copies": 3}})
    plan = make_plan(full_size(6e12), mix)
    assert [sum(c.planned for c in s.cells) for s in plan.stages] == [s.tokens for s in mix.stages]
    assert plan.stages[3].classes["long"] == 10_400_000_000
    assert plan.stages[3].asked["source-007"] == pytest.approx(0.02)
    assert max(c.copies_after for c in plan.stages[3].cells) <= 4


def test_what_is_just_enough_is_planned_and_nothing_at_all_is_told():
    sums = inventory([("a", "low", "short", 1000), ("b", "low", "short", 1000)], stages=2)
    weights = {"a": 1.0, "b": 0.0}
    first, second = make_plan(sums, config({"tokens": 2000, "source_weights": weights}, {"tokens": 2000})).stages
    assert [c.planned for c in first.cells] == [2000, 0] and [c.planned for c in second.cells] == [0, 2000]
    with pytest.raises(UserError, match="there is no document to train on"):
        make_plan(inventory([("a", "low", "short", 10, True)]), config({"tokens": 5}))
