"""Keepers: the invariants over random graphs, and the cases that transitive closure gets wrong."""

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from dedup.keepers import REMOVED, choose


def exact_pairs(pairs: list[tuple[int, int]]) -> pa.Table:
    columns = [pa.array(c, pa.uint64()) for c in (zip(*pairs, strict=True) if pairs else ([], []))]
    return pa.table(columns, names=["doc", "first"])


def near_edges(found: dict[tuple[int, int], float]) -> pa.Table:
    jaccard = pa.array(found.values(), pa.float64())
    return exact_pairs(list(found)).append_column("jaccard", jaccard)


def ranks(values: list[int]) -> pa.Table:
    return pa.table({"doc": pa.array(range(len(values)), pa.uint64()), "rank": pa.array(values, pa.uint64())})


def rows(removed: pa.Table) -> dict[int, tuple[str, int]]:
    return {r["doc"]: (r["reason"], r["keeper"]) for r in removed.to_pylist()}


@given(
    rank=st.lists(st.integers(0, 3), min_size=10, max_size=10),
    found=st.dictionaries(
        st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda e: e[0] != e[1]),
        st.sampled_from([0.8, 0.85, 1.0]),
        max_size=25,
    ),
    copied=st.lists(st.integers(0, 9), max_size=5),
    data=st.data(),
)
def test_invariants(rank, found, copied, data):
    exact = [(10 + i, first) for i, first in enumerate(copied)]
    table = ranks([*rank, *(rank[f] for f in copied)])
    removed = choose(exact_pairs(exact), near_edges(found), table)
    assert removed.schema == REMOVED and removed["doc"].to_pylist() == sorted(removed["doc"].to_pylist())
    gone = rows(removed)

    def order(doc: int) -> tuple[int, int]:
        return rank[doc], doc

    edges: dict[int, dict[int, float]] = {}
    for (a, b), jaccard in found.items():
        later, earlier = sorted((a, b), key=order, reverse=True)
        edges.setdefault(later, {})[earlier] = max(jaccard, edges.get(later, {}).get(earlier, 0))
    for doc in range(10):
        kept = {k: j for k, j in edges.get(doc, {}).items() if k not in gone}
        assert (doc in gone) == bool(kept)  # removed if and only if an edge leads to a kept document
        if kept:
            assert gone[doc] == ("near", min(kept, key=lambda k: (-kept[k], order(k))))
    for copy, first in exact:
        assert gone[copy] == ("exact", gone[first][1] if first in gone else first)
    shuffled = dict(data.draw(st.permutations(list(found.items()))))
    again = choose(exact_pairs(exact[::-1]), near_edges(shuffled), table.take(list(reversed(range(len(table))))))
    assert again.equals(removed)


def test_no_transitive_collapse_along_a_chain():
    chain = near_edges({(b, b - 1): 0.9 for b in range(1, 7)})
    assert rows(choose(exact_pairs([]), chain, ranks([0] * 7))) == {d: ("near", d - 1) for d in (1, 3, 5)}


def test_a_copy_follows_its_first_with_the_firsts_jaccard():
    removed = choose(exact_pairs([(2, 1)]), near_edges({(1, 0): 0.9}), ranks([0, 1, 1]))
    assert rows(removed) == {1: ("near", 0), 2: ("exact", 0)}
    assert removed["jaccard"].to_pylist() == pa.array([0.9, 0.9], pa.float32()).to_pylist()
    assert removed["cluster"].to_pylist() == [0, 0]
