"""Verification against Python sets of word tuples."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from dedup.config import DedupConfig
from dedup.verify import shingle_sets, verify
from tests.dedup import corpus

CONFIG = DedupConfig()
TEXTS = [
    *corpus.planted(np.random.default_rng(1), 40, ["red", "green", "blue", "black", "white", "grey"]),
    "",
    "four words are few",
]
ALL = np.arange(len(TEXTS), dtype=np.uint64)


def all_pairs() -> pa.Table:
    doc, first = np.meshgrid(ALL, ALL)
    return pa.table({"doc": doc.ravel(), "first": first.ravel()})


def true_jaccard() -> np.ndarray:
    sets = [corpus.shingles(t) for t in TEXTS]
    return np.array([corpus.jaccard(sets[d], sets[f]) for f in range(len(TEXTS)) for d in range(len(TEXTS))])


@pytest.mark.parametrize("threshold", [0.05, 0.8, 1.0])
def test_verify_keeps_the_pairs_that_reach_the_threshold(threshold):
    sets = shingle_sets(corpus.table(TEXTS), ALL, CONFIG)
    one, other = sets.slice(0, 30), sets.slice(30)
    pairs = all_pairs()
    pairs = pairs.filter(pc.and_(pc.less(pairs["doc"], 30), pc.greater_equal(pairs["first"], 30)))
    found = verify(pairs, one, other, threshold)
    truth = true_jaccard().reshape(len(TEXTS), -1)[30:, :30].ravel()
    assert found.schema == pairs.schema.append(pa.field("jaccard", pa.float64()))
    assert found["jaccard"].to_pylist() == truth[truth >= threshold].tolist()
    assert verify(all_pairs(), sets, sets, threshold)["jaccard"].to_pylist() == [
        j for j in true_jaccard().tolist() if j >= threshold
    ]


def test_sets_are_sorted_distinct_and_only_of_the_documents_asked_for(monkeypatch):
    monkeypatch.setattr("dedup.verify.BATCH_BYTES", 300)
    wanted = np.array([3, 9, 41, 77], np.uint64)  # 77 lies in another partition
    sets = shingle_sets(corpus.table(TEXTS), wanted, CONFIG)
    assert sets["doc"].to_pylist() == [3, 9, 41]
    values = [np.frombuffer(s, np.uint64) for s in sets["shingles"].to_pylist()]
    assert all((v[1:] > v[:-1]).all() for v in values)
    assert [len(v) for v in values] == [len(corpus.shingles(TEXTS[d])) for d in (3, 9, 41)]


def test_a_missing_set_is_an_error_not_a_zero():
    sets = shingle_sets(corpus.table(TEXTS), ALL[:2], CONFIG)
    with pytest.raises(KeyError, match="document 5"):
        verify(pa.table({"doc": ALL[5:6], "first": ALL[:1]}), sets, sets, 0.8)
