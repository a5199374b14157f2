"""Set intersections and greedy keepers against plain Python."""

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


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda e: e[0] > e[1]),
        st.sampled_from([0.8, 0.9, 1.0]),
        max_size=40,
    )
)
def test_keepers_are_those_of_the_plain_greedy(weights):
    expected: dict[int, int] = {}
    for node in range(13):
        kept = [(-w, b) for (a, b), w in weights.items() if a == node and b not in expected]
        if kept:
            expected[node] = min(kept)[1]
    order = sorted(weights)
    later, earlier = np.array(order, np.int64).reshape(-1, 2).T
    keeper, weight = edges.keepers(13, later.copy(), earlier.copy(), np.array([weights[e] for e in order], np.float64))
    assert {n: k for n, k in enumerate(keeper.tolist()) if k != n} == expected
    assert all(weight[n] == weights[n, k] for n, k in expected.items())


@given(st.lists(st.integers(0, 40), max_size=60))
def test_crowded_misses_no_repeated_key(keys):
    found = edges.crowded(np.array(keys, np.uint64))
    assert found.tolist() == [keys.count(key) > 1 for key in keys]  # small keys have slots of their own


def test_crowded_keeps_few_that_are_alone():
    keys = np.random.default_rng(0).integers(0, 2**64, 100_000, np.uint64)
    assert edges.crowded(keys).mean() < 0.13 and edges.crowded(np.concatenate([keys, keys])).all()
