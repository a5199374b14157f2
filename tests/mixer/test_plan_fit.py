"""The nearest plan: no feasible one is nearer, prices are what a unit more buys, small stages get what is scarce."""

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mixer import portable
from mixer.config import CLASSES
from mixer.feasible import nearest
from mixer.fit import asked_copies, fit, reference, spreads
from mixer.planner import make_plan
from mixer.problem import Problem
from tests.mixer.corpus import config
from tests.mixer.recipes import full_size, inventory, problem_of, recipes


@given(st.floats(-690, 690), st.floats(1e-290, 1e290))
def test_portable_exp_and_log_are_exp_and_log(x, y):
    assert portable.exp(np.array([x]))[0] == pytest.approx(np.exp(x), rel=4e-16 * (1 + abs(x)))
    assert portable.log(np.array([y]))[0] == pytest.approx(np.log(y), rel=4e-16, abs=4e-16)


@settings(deadline=None, max_examples=12)
@given(recipes(), st.integers(0, 10**6))
def test_no_other_feasible_plan_is_nearer(recipe, seed):
    """Against convex combinations with plans nearest to other wishes, and with the corner an LP finds."""
    p = problem_of(*recipe)
    corner, missing = nearest(p)
    assume(not missing.any())
    best = fit(p)
    assert ((p.rate * best.x).sum(axis=0) <= p.room * (1 + 1e-6)).all()
    sums = np.bincount(p.group.ravel(), best.x.ravel(), len(p.groups))
    assert sums == pytest.approx(p.targets, rel=1e-9)
    rng = np.random.default_rng(seed)
    others = [corner.astype(float)]
    for _ in range(2):
        copies = np.where(p.copies > 0, rng.uniform(0.1, 4, len(p.copies)), 0.0)
        others.append(fit(dataclasses.replace(p, copies=copies)).x)
    value = objective(p, best.x)
    for other in others:
        for part in (1e-3, 0.05, 1.0):
            assert value <= objective(p, best.x + part * (other - best.x)) + 1e-7


def objective(p: Problem, x: np.ndarray) -> float:
    """What `fit` makes least, of any x (S, C) that meets the hard targets."""
    J = p.shares.shape[1]
    total, value = p.tokens.sum(), 0.0
    for s, asked in enumerate(p.asked):
        value += spreads(p)[s] * _kl(x[s] / p.tokens[s], reference(p)[s] / p.tokens[s])
        if asked:
            value += _kl(np.bincount(p.source, x[s], J) / p.tokens[s], p.shares[s])
    return value + _kl((p.rate * x).sum(axis=0) / total, asked_copies(p) / total)


def _kl(a: np.ndarray, b: np.ndarray) -> float:
    """Of sums that may differ: sum of a log(a / b) - a + b, b > 0 wherever a is."""
    there = a > 0
    return float((a[there] * np.log(a[there] / b[there])).sum() - a.sum() + b.sum())


def example() -> Problem:
    """Two stages, three sources, caps that bind in some cells only."""
    sums = inventory(
        [
            ("a", "high", "short", 1000), ("a", "low", "long", 2000), ("b", "medium", "short", 3000),
            ("b", "high", "long", 500), ("c", "low", "short", 5000), ("c", "medium", "long", 4000),
        ],
        stages=2,
    )  # fmt: skip
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    return problem_of(
        sums,
        config({"tokens": 20_000, "source_weights": weights}, {"tokens": 5000, "shares": {"short": 0.4, "long": 0.6}}),
    )


def test_the_price_of_a_cap_is_what_one_token_more_buys():
    p = example()
    found = fit(p)
    bound = np.nonzero(found.cap_price)[0]
    assert 0 < len(bound) < len(p.cap)
    value = objective(p, found.x)
    for c in bound:
        more = dataclasses.replace(p, cap=p.cap + np.where(np.arange(len(p.cap)) == c, 1e-3, 0.0))
        bought = value - objective(more, fit(more).x)
        assert bought == pytest.approx(found.cap_price[c] * 1e-3 * p.usable[0, c], rel=0.02)


def test_the_price_of_a_class_share_is_what_moving_tokens_costs():
    p = example()
    found = fit(p)
    short, long = (n for n, g in enumerate(p.groups) if g.stage == 1 and g.length_class in ("short", "long"))
    groups = list(p.groups)
    for g, more in ((short, -5), (long, 5)):
        groups[g] = dataclasses.replace(groups[g], target=groups[g].target + more)
    other = dataclasses.replace(p, groups=tuple(groups))
    cost = objective(other, fit(other).x) - objective(p, found.x)
    assert cost == pytest.approx(5 * (found.group_price[long] - found.group_price[short]), rel=0.05)


def test_a_scarce_source_goes_to_the_small_late_stage_and_the_main_stage_gives_way():
    sums = inventory([("books", "medium", "short", 100_000), ("web", "medium", "short", 10**8)], stages=2)
    weights = {"books": 0.5, "web": 0.5}
    main, late = make_plan(
        sums, config({"tokens": 10**8, "source_weights": weights}, {"tokens": 10**5, "source_weights": weights})
    ).stages
    shares = [sum(c.planned for c in s.cells if c.source == "books") / s.tokens for s in (main, late)]
    assert shares[1] > 0.45 and shares[0] * 10**8 > 300_000


def test_copies_asked_for_are_met_where_the_budget_is_the_sum_of_them():
    cells = [("a", "high", "short", 1000), ("a", "medium", "long", 500), ("b", "low", "short", 700)]
    sums = inventory(cells, stages=2)
    tiers = {"high": {"copies": 2.5}, "medium": {"copies": 1.5}, "low": {"copies": 0.5}}
    plan = make_plan(sums, config({"tokens": 1800}, {"tokens": 1800}, tiers=tiers))
    after = {c.tier: c.copies_after for c in plan.stages[1].cells}
    assert after == pytest.approx({"high": 2.5, "medium": 1.5, "low": 0.5}, abs=2e-3)
    assert plan.limits == ()


def curriculum(tokens: float, sources: int):
    """Weights far from how the sources come, and class shares that their documents do not have."""
    sums, rng = full_size(tokens, sources), np.random.default_rng(0)

    def weights():
        parts = rng.lognormal(0, 0.5, sources) * [
            sum(c["tokens"] for c in sums["cells"] if c["source"] == f"source-{j:03d}") for j in range(sources)
        ]
        return {f"source-{j:03d}": part for j, part in enumerate((parts / parts.sum()).tolist())}

    extension = [(0.03, (0.3, 0.7, 0.0)), (0.003, (0.35, 0.35, 0.3)), (0.0025, (0.3, 0.3, 0.4))]
    stages = [{"tokens": int(part * tokens), "shares": dict(zip(CLASSES, s, strict=True))} for part, s in extension]
    mix = config(*({"tokens": int(1.2 * tokens)}, *stages), tiers={"high": {"copies": 3}})
    return problem_of(sums, mix.model_copy(update={"stages": [
        stage.model_copy(update={"source_weights": weights()}) for stage in mix.stages
    ]}))  # fmt: skip


def test_source_weights_are_not_given_up_for_tiers_and_classes_that_nobody_asked_of_a_source(monkeypatch):
    """Tokens at the wrong source, in percent of the worst stage; the copies of each tier are the same either way."""
    p = curriculum(1e12, 12)
    wrong, copies = [], []
    for asking in (1 / 64, 1 / 4):
        monkeypatch.setattr("mixer.fit.ASKING", asking)
        x = fit(p).x
        by_source = np.array([np.bincount(p.source, row, 12) for row in x]) / p.tokens[:, None]
        wrong.append(50 * np.abs(by_source - p.shares).sum(axis=1).max())
        copies.append([x[:, p.copies == n].sum() / p.usable[0, p.copies == n].sum() for n in (1, 3)])
    assert wrong[0] < 0.5 and wrong[1] > 2.5
    assert copies[0] == pytest.approx(copies[1], rel=0.005)
