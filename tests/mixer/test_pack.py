"""Packing: every token where its segment says, nothing lost, the same bytes whatever the order of the items."""

import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixer.draw import DRAWN
from mixer.guarantees import add_counts, broken, summary
from mixer.pack import deal, pack_window
from mixer.plan import CellPlan, StagePlan
from mixer.shards import StageInfo

EOS = 7
CELLS = tuple(CellPlan(s, "low", "short", 9, 9, n, 0.0, 1.0, "") for s, n in (("a", 1), ("b", 3)))
CAPS = dict.fromkeys(("low", "medium", "high"), 3)
STAGE = StagePlan("s", 0, 50, 1e4, 4, "split", 1, {}, CELLS)


def info(context, dtype="uint16"):
    size = 50_000 if dtype == "uint16" else 200_000
    return StageInfo(
        "s", 0, context, 1e4, 1, size, EOS, dtype, ("a", "b"), ("low", "medium", "high"), ("short", "medium", "long"),
        "t", "p", 1,
    )  # fmt: skip


def items(lengths, dtype="uint16", window=0):
    """Items whose token i of document d is 1000 d + i; some share their place in the order."""
    n = len(lengths)
    rng = np.random.default_rng(n)
    ids = [(1000 * d + np.arange(length)).astype(dtype).tobytes() for d, length in enumerate(lengths)]
    columns = [
        np.full(n, window), rng.integers(0, n + 1, n), np.arange(n), 50 * (np.arange(n) % 2), rng.integers(0, 3, n),
        np.arange(n) % 2, np.arange(n) % 3, np.arange(n) % 3,
    ]  # fmt: skip
    arrays = [pa.array(c).cast(f.type) for c, f in zip(columns, DRAWN, strict=False)]
    return pa.table([*arrays, pa.array(ids, pa.large_binary())], schema=DRAWN)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 90), max_size=25),
    st.sampled_from([1, 3, 16, 50]),
    st.sampled_from(["split", "truncate", "drop"]),
    st.sampled_from(["uint16", "uint32"]),
    st.randoms(use_true_random=False),
)
def test_every_token_is_where_its_segment_says(lengths, context, policy, dtype, random):
    drawn = items(lengths, dtype)
    packed = pack_window(drawn, info(context, dtype), policy, seed=1)
    tokens, segments, counts = packed.tokens, packed.segments, packed.counts
    assert tokens.dtype == dtype and tokens.shape == (counts["sequences"], context)

    covered = np.zeros(tokens.shape, int)
    seen = {d: [] for d in range(len(lengths))}
    by_doc = drawn.drop_columns("ids").to_pylist()
    for s in segments:
        here = tokens[s["sequence"], s["start"] : s["start"] + s["length"]]
        s["offset"] -= 50 * (s["doc"] % 2)  # where the item begins in its document
        first = 1000 * int(s["doc"]) + int(s["offset"])
        assert np.array_equal(here, (first + np.arange(s["length"])).astype(dtype))
        covered[s["sequence"], s["start"] : s["start"] + s["length"]] += 1
        seen[s["doc"]].append((int(s["offset"]), int(s["length"])))
        assert all(s[name] == by_doc[s["doc"]][name] for name in ("copy", "source", "tier", "length_class"))
    assert covered.max(initial=0) <= 1
    assert (tokens[covered == 0] == EOS).all()
    assert (np.diff(covered, axis=1) <= 0).all()  # padding only at the end
    assert (covered.sum(axis=1) > 0).all()
    assert np.array_equal(segments, np.sort(segments, order=["sequence", "start"]))

    for doc, length in enumerate(lengths):
        pieces = [(o, min(context, length - o)) for o in range(0, length, context)]
        if policy == "truncate":
            pieces = pieces[:1]
        elif policy == "drop" and length > context:
            pieces = []
        assert sorted(seen[doc]) == pieces
    assert counts["tokens_in"] == sum(lengths) == counts["packed"] + counts["truncated"] + counts["dropped"]
    assert counts["sequences"] * context == counts["packed"] + counts["padding"]
    assert not counts["cut_though_fitting"] and counts["pieces"] == sum(len(p) for p in seen.values() if len(p) > 1)
    assert counts["cut"] == sum(len(p) > 1 for p in seen.values())
    assert counts["cost"]["max"] == max(
        (sum(int(s["length"]) ** 2 for s in segments if s["sequence"] == n) for n in range(len(tokens))), default=0
    )
    assert counts["packed"] == covered.sum() == sum(cell["tokens"] for cell in counts["cells"])

    packed = pack_window(drawn, info(context, dtype), policy, seed=1)
    segments = packed.segments
    order = list(range(len(lengths)))
    random.shuffle(order)
    again = pack_window(drawn.take(pa.array(order, pa.int64())), info(context, dtype), policy, seed=1)
    assert tokens.tobytes() == again.tokens.tobytes() and segments.tobytes() == again.segments.tobytes()
    assert counts == again.counts


def test_tables_of_many_chunks_and_slices_are_read_right():
    drawn = items([30, 5, 60, 12, 44, 8])
    whole = pack_window(drawn, info(50), "split", 0)
    chunks = pack_window(pa.concat_tables([drawn.slice(3), drawn.slice(0, 3)]), info(50), "split", 0)
    assert whole.tokens.tobytes() == chunks.tokens.tobytes()
    part = pack_window(drawn.slice(2, 2), info(50), "split", 0)
    assert part.counts["tokens_in"] == 72


def test_sequences_are_shuffled_by_seed_and_window_not_left_in_order_of_length():
    lengths = np.random.default_rng(0).integers(26, 51, 400).tolist()  # one to a sequence
    packed = pack_window(items(lengths), info(50), "split", 0)
    assert packed.counts["sequences"] == 400
    assert abs(np.corrcoef(packed.segments["length"], np.arange(400))[0, 1]) < 0.15
    for other in (
        pack_window(items(lengths), info(50), "split", 1),
        pack_window(items(lengths, window=1), info(50), "split", 0),
    ):
        assert not np.array_equal(packed.segments["doc"], other.segments["doc"])
        assert Counter(packed.segments["doc"]) == Counter(other.segments["doc"])


@given(st.integers(0, 300), st.integers(0, 5))
def test_dealing_is_a_permutation_that_spreads_costs_over_any_slice(n, seed):
    costs = np.random.default_rng(seed).lognormal(0, 2, n)
    row = deal(costs, seed, "s", 3)
    assert sorted(row) == list(range(n)) and np.array_equal(row, deal(costs, seed, "s", 3))
    rank = np.empty(n, int)
    rank[row] = np.argsort(np.argsort(costs))  # of each row
    for size in (8, 20, 64):
        for start in range(0, n - size + 1, 5):  # a slice of anything: nowhere more than a few from the even spread
            share = np.sort(rank[start : start + size] / n)
            assert np.abs(share - (np.arange(size) + 0.5) / size).max() < 3 * np.log2(4 * size) / 2 / size
    if n >= 256:
        whole = deal(costs[:256], seed, "s", 3)
        rank = np.empty(256, int)
        rank[whole] = np.argsort(np.argsort(costs[:256]))
        for size in (2, 8, 32):  # an aligned slice has one of each of as many equal parts of the ranks
            assert (np.sort(rank.reshape(-1, size) // (256 // size)) == np.arange(size)).all()


def test_padding_is_small_on_log_normal_lengths():
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1.2, 3000).astype(int), 1, 900).tolist()
    counts = pack_window(items(lengths), info(512, "uint32"), "split", 0).counts
    assert counts["padding"] < 0.005 * counts["packed"]


def test_totals_follow_from_the_sequences_of_all_windows():
    rng = np.random.default_rng(0)
    windows = [rng.integers(1, 60, n).tolist() for n in (200, 90, 0, 130)]
    packed = [pack_window(items(lengths), info(50), "split", 0) for lengths in windows]
    counts = add_counts(p.counts for p in packed)
    totals = summary(counts, STAGE, CAPS)
    squares, means = [], []
    for p in packed:
        for row in range(len(p.tokens)):
            lengths = p.segments["length"][p.segments["sequence"] == row]
            squares.append(int((lengths**2).sum()))
            means.append((lengths**2).sum() / lengths.sum())
    expected = np.corrcoef(np.arange(len(means)), means)[0, 1]
    assert totals["order_length_correlation"] == pytest.approx(expected, abs=1e-9)
    assert totals["sum_of_squares"]["max"] == max(squares)
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        assert totals["sum_of_squares"][name] == pytest.approx(np.quantile(squares, part), rel=0.03)
    assert totals["shares"]["source"]["a"][0] == 0.25 and totals["shares"]["source"]["b"][0] == 0.75
    by_class = {name: share for name, (_, share) in totals["shares"]["length_class"].items()}
    assert sum(by_class.values()) == pytest.approx(1) and by_class["short"] > 0.2
    assert broken(totals, 50) == []
    alike = add_counts(pack_window(items([50] * n), info(50), "split", 0).counts for n in (300, 200))
    assert summary(alike, STAGE, CAPS)["order_length_correlation"] == 0


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t["sources"]["b"].update(packed=1), "source b: .* tokens in, but 1 packed"),
        (lambda t: t.update(padding=t["padding"] + 1), "padding"),
        (lambda t: t.update(cut_though_fitting=2), "2 documents that fit are cut"),
        (lambda t: t["most_copies"].update(high=[4, 3]), "tier high has 4 copies, over its cap of 3"),
    ],
)
def test_a_broken_promise_is_told(change, message):
    totals = summary(pack_window(items([30, 5, 60]), info(50), "split", 0).counts, STAGE, CAPS)
    assert broken(totals, 50) == []
    change(totals)
    assert len(broken(totals, 50)) == 1 and re.search(message, broken(totals, 50)[0])


def test_counts_add_up():
    counts = [pack_window(items(lengths), info(40), "truncate", 0).counts for lengths in ([50, 3], [41, 2, 70], [])]
    total = add_counts(counts)
    assert (total["items"], total["truncated"]) == (5, 10 + 1 + 30)
    assert sum(cell["tokens"] for cell in total["cells"]) == total["packed"]
    assert [cell["source"] for cell in total["cells"]] == ["a", "a", "b"]


@pytest.mark.parametrize("policy", ["split", "truncate", "drop"])
def test_an_empty_window_is_no_special_case(policy):
    packed = pack_window(DRAWN.empty_table(), info(40), policy, 0)
    assert packed.tokens.shape == (0, 40) and len(packed.segments) == 0 and packed.counts["cells"] == []
