"""Cuts: drawn tokens against planned ones, by class and by source, for cells listed in full and for bucketed ones."""

from collections import Counter

import numpy as np
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataprep.storage import UserError
from mixer.config import CLASSES, TIERS
from tests.mixer.corpus import config, corpus, drawn, planned

PARTS = corpus()
SHARES = [{"short": 0.3, "medium": 0.3, "long": 0.4}, {"short": 0.5, "medium": 0.5, "long": 0.0}, None]


def packed_tokens(items, plan, stage):
    """(class, source) -> tokens that the stage's policy leaves of what was drawn."""
    tokens = Counter()
    for row in items.drop_columns(["order"]).to_pylist():
        n = len(row["ids"]) // 2
        if stage.long_documents == "truncate":
            n = min(n, stage.context)
        elif stage.long_documents == "drop" and n > stage.context:
            n = 0
        tokens[CLASSES[row["length_class"]], plan.sources[row["source"]]] += n
    return tokens


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(6_000, 30_000), st.sampled_from(SHARES), st.sampled_from(["split", "truncate", "drop"]),
            st.sampled_from([200, 256, 1000]),
        ),
        min_size=1, max_size=3,
    ),
    st.integers(0, 1000),
)  # fmt: skip
def test_classes_come_out_as_planned(stages, seed):
    """In any stage, under any policy: within half a document of the whole class, a source within two."""
    recipe = [dict(zip(("tokens", "shares", "long_documents", "context"), stage, strict=True)) for stage in stages]
    try:
        inventories, plan = planned(PARTS, config(*recipe, seed=seed))
    except UserError:
        return
    for stage in plan.stages:
        tokens = packed_tokens(drawn(PARTS, inventories, plan, stage.name), plan, stage)
        for length_class, longest in zip(CLASSES, (50, 150, 1000), strict=True):
            cells = [c for c in stage.cells if c.length_class == length_class]
            if any(c.why == "cap binds" for s in plan.stages for c in s.cells):
                continue  # nothing is left to draw instead
            packed = sum(n for (name, _), n in tokens.items() if name == length_class)
            assert abs(packed - sum(c.planned for c in cells)) <= longest / 2
            for source in plan.sources:
                planned_here = sum(c.planned for c in cells if c.source == source)
                assert abs(tokens[length_class, source] - planned_here) <= 2 * longest


@pytest.mark.parametrize("exact", [0, 4096])
def test_shares_of_a_stage_of_a_few_hundred_documents(monkeypatch, exact):
    """Within half a point where items are listed; where a bucket holds several, its hashes decide."""
    monkeypatch.setattr("mixer.inventory.EXACT", exact)
    parts = corpus(3000, seed=3)
    for seed in range(3):
        mix = config(
            {"tokens": 120_000, "shares": {"short": 0.2, "medium": 0.4, "long": 0.4}, "context": 512}, seed=seed
        )
        inventories, plan = planned(parts, mix)
        assert plan.places["exact"].to_pylist().count(False) == (0 if exact else len(plan.places))
        tokens = packed_tokens(drawn(parts, inventories, plan, "s0"), plan, plan.stages[0])
        for name, share in {"short": 0.2, "medium": 0.4, "long": 0.4}.items():
            packed = sum(n for (length_class, _), n in tokens.items() if length_class == name)
            assert packed / tokens.total() == pytest.approx(share, abs=0.005 if exact else 0.02)


def test_a_source_of_weight_0_gives_nothing_to_make_up_for_others():
    mix = config({"tokens": 9_999, "source_weights": {"books": 0}}, {"tokens": 30_000})
    inventories, plan = planned(PARTS, mix)
    items = drawn(PARTS, inventories, plan, "s0")
    assert set(items["source"].to_pylist()) == {plan.sources.index("web")}


def test_small_cells_are_listed_and_large_ones_are_not(monkeypatch):
    monkeypatch.setattr("mixer.inventory.EXACT", 60)
    inventories, plan = planned(PARTS, config({"tokens": 20_000}))
    for row in plan.places.filter(pc.invert(plan.places["held_out"])).to_pylist():
        documents = 0
        for table in inventories:
            same = (table["source"].to_numpy() == row["source"]) & ~table["held_out"].to_numpy()
            same &= table["tier"].to_numpy() == TIERS.index(row["tier"])
            documents += int((same & (table["length_class"].to_numpy() == CLASSES.index(row["length_class"]))).sum())
        if row["length_class"] != "long":  # whose documents over the context count in parts
            assert row["exact"] == (documents <= 60)
            assert len(row["knots"]) == (documents if row["exact"] else 1024)
        assert row["cumulative"][0] == 0 and row["cumulative"][-1] == pytest.approx(1)
        assert (np.diff(row["cumulative"]) >= 0).all() and row["copies"][0] == 0
