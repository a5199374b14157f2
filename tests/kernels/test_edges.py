"""Set intersections and crowded keys against plain Python; the greedy keepers: tests/dedup/test_keepers.py."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernels import edges

SETS = st.lists(st.lists(st.integers(0, 30), max_size=15), min_size=1, max_size=6)


def flat(sets: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    values = np.array([v for s in sets for v in sorted(s)], np.uint64)
    return values, np.cumsum([0, *map(len, sets)])


@given(a=SETS, b=SETS, data=st.data())
def test_intersections_of_distinct_values(a, b, data):
    pairs = data.draw(st.lists(st.tuples(st.integers(0, len(a) - 1), st.integers(0, len(b) - 1)), max_size=9))
    rows_a, rows_b = np.array(pairs, np.int64).reshape(-1, 2).T
    distinct = [edges.distinct(*flat(sets)) for sets in (a, b)]
    shared = edges.intersections(*distinct[0], rows_a.copy(), *distinct[1], rows_b.copy())
    assert shared.tolist() == [len(set(a[i]) & set(b[j])) for i, j in pairs]


@given(st.lists(st.integers(0, 40), max_size=60))
def test_crowded_misses_no_repeated_key(keys):
    found = edges.crowded(np.array(keys, np.uint64))
    assert found.tolist() == [keys.count(key) > 1 for key in keys]  # small keys have slots of their own


def test_crowded_keeps_few_that_are_alone():
    keys = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    assert edges.crowded(keys).mean() < 0.13 and edges.crowded(np.concatenate([keys, keys])).all()
