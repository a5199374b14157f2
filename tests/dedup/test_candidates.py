"""Candidate pairs against plain Python over dictionaries of buckets."""

from collections import defaultdict

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from dedup.candidates import PAIRS, ROWS, bucket_rows, pairs

# A document: (rank, content, band keys); equal content means equal band keys, as it does for real documents.
CONTENTS = st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=6)
DOCUMENTS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=14)


def signed(contents: list[list[int]], documents: list[tuple[int, int]]) -> pa.Table:
    chosen = [c % len(contents) for _, c in documents]
    return pa.table(
        {
            "doc": pa.array(range(len(documents)), pa.uint64()),
            "rank": pa.array([r for r, _ in documents], pa.uint64()),
            "hash_low": pa.array(chosen, pa.uint64()),
            "hash_high": pa.array([c + 50 for c in chosen], pa.uint64()),
            "bands": pa.array(
                [[100 * b + k for b, k in enumerate(contents[c])] for c in chosen], pa.large_list(pa.uint64())
            ),
        }
    )


def expected(table: pa.Table) -> set[tuple[int, int, bool]]:
    rows = sorted(table.to_pylist(), key=lambda r: (r["rank"], r["doc"]))
    found, leaders, buckets = set(), {}, defaultdict(list)
    for row in rows:
        first = leaders.setdefault(row["hash_low"], row["doc"])
        if first != row["doc"]:
            found.add((row["doc"], first, True))
            continue
        for key in row["bands"]:
            buckets[key].append(row["doc"])
    return found | {(doc, bucket[0], False) for bucket in buckets.values() for doc in bucket[1:]}


@given(contents=CONTENTS, documents=DOCUMENTS, data=st.data())
def test_pairs_are_stars_around_the_first_whatever_the_order(contents, documents, data):
    table = signed(contents, documents)
    rows = bucket_rows(table)
    assert rows.schema == ROWS and len(rows) == 4 * len(documents)
    found = pairs(rows)
    assert found.schema == PAIRS
    listed = [(row["doc"], row["first"], row["exact"]) for row in found.to_pylist()]
    ranks = dict(zip(table["doc"].to_pylist(), table["rank"].to_pylist(), strict=True))
    assert [(ranks[r["doc"]], ranks[r["first"]]) for r in found.to_pylist()] == [
        (r["rank"], r["first_rank"]) for r in found.to_pylist()
    ]
    assert set(listed) == expected(table) and len(listed) == len(set(listed))
    shuffled = rows.take(np.array(data.draw(st.permutations(range(len(rows)))), np.int64))
    assert pairs(shuffled).equals(found)


def test_documents_without_bands_are_compared_exactly_only():
    table = signed([[1, 2, 3]], [(0, 0), (0, 0)]).drop_columns("bands")
    table = table.append_column("bands", pa.array([[], []], pa.large_list(pa.uint64())))
    assert pairs(bucket_rows(table)).select(["doc", "first", "exact"]).to_pylist() == [
        {"doc": 1, "first": 0, "exact": True}
    ]


def test_half_a_content_hash_is_not_a_copy():
    rows = {"key": [7, 7], "exact": [True, True], "check": [1, 2], "rank": [0, 0], "doc": [0, 1]}
    assert len(pairs(pa.table(rows, schema=ROWS))) == 0


def test_a_bucket_of_a_hundred_thousand_stays_linear():
    count = 100_000
    rows = {
        "key": np.zeros(count, np.uint64),
        "exact": np.zeros(count, bool),
        "check": np.arange(count, dtype=np.uint64),
        "rank": np.arange(count, dtype=np.uint64)[::-1],
        "doc": np.arange(count, dtype=np.uint64),
    }
    found = pairs(pa.table(rows, schema=ROWS))
    assert len(found) == count - 1 and set(found["first"].to_pylist()) == {count - 1}
