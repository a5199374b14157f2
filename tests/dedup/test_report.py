"""Attributes of a partition, their sums, and the alarm."""

import numpy as np
import pyarrow as pa
import pytest

from dedup.keepers import REMOVED
from dedup.report import ATTRIBUTES, aggregates, alarm, attributes, worst_loss

REMOVALS = pa.table(
    {
        "doc": pa.array([2, 3, 99], pa.uint64()),
        "reason": pa.array(["near", "exact", "near"]).dictionary_encode(),
        "keeper": pa.array([1, 50, 1], pa.uint64()),
        "jaccard": pa.array([0.9, 1, 0.8], pa.float32()),
        "cluster": pa.array([1, 50, 1], pa.uint64()),
    },
    schema=REMOVED,
)


def test_attributes_cover_the_partition_in_its_order():
    found = attributes(np.array([3, 1, 2], np.uint64), REMOVALS)
    assert found.schema == ATTRIBUTES
    assert found.to_pydict() == {
        "doc": [3, 1, 2],
        "keep": [False, True, False],
        "reason": ["exact", None, "near"],
        "keeper": [50, None, 1],
        "jaccard": [1, None, pytest.approx(0.9)],
        "cluster": [50, 1, 1],
    }


def test_aggregates():
    documents = pa.table({"source": pa.array(["web", "web", "books"]).dictionary_encode(), "length": [10, 20, 30]})
    part = aggregates(documents, attributes(np.array([3, 1, 2], np.uint64), REMOVALS))
    assert part == {
        "books": {"near": {"documents": 1, "bytes": 30}},
        "web": {"exact": {"documents": 1, "bytes": 10}, "kept": {"documents": 1, "bytes": 20}},
    }


def counts(kept: int, near: int, exact: int = 0) -> dict[str, dict[str, int]]:
    return {r: {"documents": n, "bytes": n * 9} for r, n in (("kept", kept), ("near", near), ("exact", exact))}


def test_the_worst_loss_is_to_near_duplicates_of_one_source():
    assert worst_loss({}) == (0, "", "documents")
    assert worst_loss({"copies": counts(1, 0, exact=99)})[0] == 0
    assert worst_loss({"web": counts(10, 90), "calls": counts(2, 998)}) == (0.998, "calls", "documents")


def test_loss_of_bytes_counts_too():
    books = {"kept": {"documents": 90, "bytes": 100}, "near": {"documents": 10, "bytes": 300}}
    assert worst_loss({"books": books}) == (0.75, "books", "bytes")


def test_the_alarm_says_what_where_and_what_to_do():
    text = alarm({"web": counts(10, 90), "calls": counts(2, 998)}, 0.5, ["  the clusters"])
    assert "source calls: " in text and "99.8% of its documents" in text and "50.0%" in text
    assert "  the clusters\n" in text and text.endswith("dedup.max_source_loss: 1.00")
