"""Draws: caps hold for every document, tokens come out as planned, copies are spread, nothing depends on partitions."""

import dataclasses
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataprep.storage import UserError
from mixer.config import TIERS
from mixer.draw import DRAWN, _windows, at_density, draw
from tests.mixer.corpus import config, corpus, drawn, partition, planned

PARTS = corpus()
STAGES = (
    {"tokens": 60_000},
    {"tokens": 20_000, "context": 160, "shares": {"short": 0.1, "medium": 0.4, "long": 0.5}},
    {"tokens": 15_000, "shares": {"short": 0.2, "medium": 0.2, "long": 0.6}},
)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1000, 60_000), min_size=1, max_size=4))
def test_caps_and_planned_tokens(seed, amounts):
    mix = config(*[STAGES[i % 3] | {"tokens": tokens} for i, tokens in enumerate(amounts)], seed=seed)
    try:
        inventories, plan = planned(PARTS, mix)
    except UserError:
        return
    copies: dict[int, list[int]] = {}
    tiers = {}
    longest = Counter()
    for inventory in inventories:
        for row in inventory.to_pylist():
            key = (row["source"], row["tier"], row["length_class"])
            longest[key] = max(longest[key], min(row["n_tokens"], 256))  # 256: the longest context
    for stage in plan.stages:
        items = drawn(PARTS, inventories, plan, stage.name)
        tokens = Counter()
        for row in items.to_pylist():
            copies.setdefault((row["doc"], row["offset"]), []).append(row["copy"])
            tiers[row["doc"], row["offset"]] = TIERS[row["tier"]]
            tokens[plan.sources[row["source"]], row["tier"], row["length_class"]] += len(row["ids"]) // 2
        for cell in stage.cells:
            key = (cell.source, TIERS.index(cell.tier), ("short", "medium", "long").index(cell.length_class))
            # Its own rounding, and of the other cells' what it takes over.
            assert abs(tokens[key] - cell.planned) <= max(2 * longest[key], 0.75 * cell.planned)
    for doc, numbers in copies.items():
        assert sorted(numbers) == list(range(len(numbers)))  # each copy once, over all stages
        assert len(numbers) <= mix.tiers[tiers[doc]].cap


def test_all_copies_the_caps_allow():
    mix = config({"tokens": 1}, held_out={"fraction": 0})
    inventories, _ = planned(PARTS, mix)
    everything = 0
    for inventory in inventories:
        caps = np.array([2, 4, 4])[inventory["tier"].to_numpy()]
        everything += int((caps * inventory["n_tokens"].to_numpy()).sum())
    inventories, plan = planned(PARTS, config({"tokens": everything}, held_out={"fraction": 0}))
    items = drawn(PARTS, inventories, plan, "s0")
    assert sum(len(ids) for ids in items["ids"].to_pylist()) // 2 == everything


def test_copies_of_a_document_are_spread_over_the_stage():
    parts = [partition(0, [50] * 200, duplicates=0)]
    mix = config({"tokens": 4 * 50 * 100}, tiers={t: {"copies": 1, "cap": 4} for t in TIERS}, shard_tokens=500)
    inventories, plan = planned(parts, mix)
    items = drawn(parts, inventories, plan, "s0")
    assert plan.stages[0].shards == 40
    assert items["window"].to_numpy().max() < 40
    places = {}
    for row in items.to_pylist():
        places.setdefault(row["doc"], []).append(row["order"] / 2**64)
        assert row["window"] == int(row["order"] / 2**64 * 40)
    repeated = [sorted(p) for p in places.values() if len(p) > 1]
    assert len(repeated) > 100
    for place in repeated:  # a round of the cell apart
        assert np.diff(place) == pytest.approx(1 / plan.stages[0].cells[0].copies_after, rel=0.02)


def test_a_document_comes_again_only_when_its_cell_has_been_gone_through():
    inventories, plan = planned(PARTS, config({"tokens": 75_000}, {"tokens": 75_000}, shard_tokens=15_000))
    by_cell: dict[tuple, list] = {}
    for name in ("s0", "s1"):
        for row in drawn(PARTS, inventories, plan, name).drop_columns(["ids"]).sort_by("order").to_pylist():
            cell = by_cell.setdefault((row["source"], row["tier"], row["length_class"]), [])
            cell.append((row["doc"], row["offset"]))
    for items in by_cell.values():
        round_ = items[: len(set(items))]
        assert items == [round_[i % len(round_)] for i in range(len(items))]
    assert max(len(items) / len(set(items)) for items in by_cell.values()) > 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_places_follow_a_density(pieces):
    """pieces: (width, density at the left end, at the right end), steps between them."""
    width = sum(w for w, _, _ in pieces)
    area = sum(w / width * (a + b) / 2 for w, a, b in pieces)
    if area == 0:
        return
    ends = np.cumsum([0, *(w for w, _, _ in pieces)]) / width
    knots = [
        (x, d / area) for (_, a, b), x, y in zip(pieces, ends[:-1], ends[1:], strict=True) for x, d in ((x, a), (y, b))
    ]
    places = at_density(np.linspace(0, 1 - 1e-9, 20_000), knots)
    assert (places[1:] >= places[:-1]).all()
    grid = np.linspace(0, 1, 201)
    fine = np.linspace(0, 1, 200_001)
    of_piece = np.clip(np.searchsorted(ends, fine, side="right") - 1, 0, len(pieces) - 1)
    left, right = (np.array([p[i] for p in pieces])[of_piece] for i in (1, 2))
    into = (fine - ends[of_piece]) / np.diff(ends)[of_piece]
    below = np.cumsum(left + (right - left) * into) / 200_001 / area  # the density's integral, by summing it
    found = np.searchsorted(places, grid, side="right") / len(places)
    assert np.abs(found - below[np.searchsorted(fine, grid).clip(max=200_000)]).max() < 2e-3


@given(st.lists(st.tuples(st.integers(1, 12), st.randoms(use_true_random=False)), max_size=8), st.integers(1, 10))
def test_no_two_copies_share_a_window(items, windows):
    orders = [sorted(random.randrange(2**64) for _ in range(copies)) for copies, random in items]
    copies = np.array([len(o) for o in orders], np.int64)
    item, nth = np.repeat(np.arange(len(orders)), copies), np.concatenate([np.arange(0), *map(np.arange, copies)])
    flat = np.array([o for order in orders for o in order], np.uint64)
    found = _windows(flat, item, nth, copies[item], windows)
    assert ((found >= 0) & (found < windows)).all()
    for i, order in enumerate(orders):
        own = [o * windows >> 64 for o in order]
        if len(order) > windows or len(set(own)) == len(own):
            assert found[item == i].tolist() == own
        else:
            assert len(set(found[item == i].tolist())) == len(own)


def test_sources_move_through_a_stage_as_their_densities_say_and_copies_stay_apart():
    mix = config({"tokens": 150_000}, shard_tokens=10_000)
    inventories, plan = planned(PARTS, mix)
    ramp = dataclasses.replace(
        plan.stages[0], densities={"web": [(0.0, 2.0), (1.0, 0.0)], "gone": [(0.0, 1.0), (1.0, 1.0)]}
    )
    plan = dataclasses.replace(plan, stages=(ramp,))
    items = drawn(PARTS, inventories, plan, "s0").drop_columns(["ids"]).to_pylist()
    places = {name: [r["order"] / 2**64 for r in items if plan.sources[r["source"]] == name] for name in plan.sources}
    assert np.mean(places["web"]) == pytest.approx(1 / 3, abs=0.03)
    assert np.mean(places["books"]) == pytest.approx(1 / 2, abs=0.03)
    windows = Counter((r["doc"], r["offset"], r["window"]) for r in items)
    assert max(windows.values()) == 1 and len({(d, o) for d, o, _ in windows}) < len(windows)


def test_windows_are_equally_full_but_for_a_few_documents():
    inventories, plan = planned(PARTS, config({"tokens": 60_000}, shard_tokens=15_000))
    items = drawn(PARTS, inventories, plan, "s0")
    sizes = [sum(map(len, items.filter(pc.equal(items["window"], w))["ids"].to_pylist())) // 2 for w in range(4)]
    assert min(sizes) > 13_500 and max(sizes) < 16_500


def test_the_draw_does_not_depend_on_how_the_corpus_is_cut():
    inventories, plan = planned(PARTS, config(*STAGES))
    for name in ("s0", "held-out"):
        whole = drawn(PARTS, inventories, plan, name)
        cut = [
            draw(i.slice(a, 70), p.tokens, plan, name)
            for i, p in zip(inventories, PARTS, strict=True)
            for a in range(0, 400, 70)
        ]
        keys = [(name, "ascending") for name in ("order", "doc", "offset", "copy")]
        assert whole.schema == DRAWN
        assert pa.concat_tables(cut).sort_by(keys).equals(whole.sort_by(keys))


def test_held_out_documents_are_drawn_once_and_never_for_training():
    mix = config(*STAGES, held_out={"fraction": 0.1, "tokens": 10**9})
    inventories, plan = planned(PARTS, mix)
    items = drawn(PARTS, inventories, plan, "held-out")
    held_out = items.filter(pc.equal(items["offset"], 0))["doc"].to_pylist()
    expected = [
        d for i in inventories for d, h in zip(i["doc"].to_pylist(), i["held_out"].to_pylist(), strict=True) if h
    ]
    assert sorted(held_out) == sorted(expected) and len(held_out) > 50
    for stage in plan.stages:
        assert not set(held_out) & set(drawn(PARTS, inventories, plan, stage.name)["doc"].to_pylist())


def test_no_held_out_documents_are_no_special_case():
    inventories, plan = planned(PARTS[:1], config({"tokens": 5000}, held_out={"fraction": 0}))
    assert drawn(PARTS[:1], inventories, plan, "held-out").equals(DRAWN.empty_table())
    assert len(draw(inventories[0].slice(0, 0), PARTS[0].tokens, plan, "s0")) == 0


def test_the_ids_are_the_documents_own():
    inventories, plan = planned(PARTS, config(*STAGES))
    for row in drawn(PARTS, inventories, plan, "s1").to_pylist():
        file, record = divmod(row["doc"], 1 << 40)
        whole = PARTS[file].tokens["ids"][record].as_py()
        assert row["offset"] % 256 == 0 and row["ids"] == whole[2 * row["offset"] : 2 * (row["offset"] + 256)]


def test_tables_that_do_not_belong_together_are_refused():
    inventories, plan = planned(PARTS[:1], config({"tokens": 5000}))
    other, _ = planned(PARTS[1:2], config({"tokens": 5000}))
    with pytest.raises(UserError, match="source 'books' is not in the plan"):
        draw(other[0], PARTS[1].tokens, plan, "s0")
    more, _ = planned([partition(0, PARTS[0].tokens["n_tokens"].to_pylist(), duplicates=0)], config({"tokens": 5000}))
    with pytest.raises(UserError, match="table of places lacks"):  # documents that were duplicates then
        draw(more[0], PARTS[0].tokens, plan, "s0")
    with pytest.raises(UserError, match="other documents than the inventory"):
        draw(inventories[0], PARTS[1].tokens, plan, "s0")


def test_the_cap_holds_for_the_last_document_of_a_cell_too(monkeypatch):
    """Its place is so near to 1 that `copies + place` rounds up to the next whole number."""
    parts = [partition(0, [10] * 50, duplicates=0)]
    mix = config(
        {"tokens": 700}, {"tokens": 800}, tiers={t: {"copies": 1, "cap": 3} for t in TIERS}, held_out={"fraction": 0}
    )
    monkeypatch.setattr("mixer.inventory.EXACT", 0)
    for module in ("inventory", "draw"):
        monkeypatch.setattr(f"mixer.{module}.draw_hash", lambda seed, doc, offset: np.full(len(doc), 2**32 - 1))
    inventories, plan = planned(parts, mix)
    copies = Counter(d for name in ("s0", "s1") for d in drawn(parts, inventories, plan, name)["doc"].to_pylist())
    assert set(copies.values()) == {3}
