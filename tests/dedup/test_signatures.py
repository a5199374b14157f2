"""Signatures: one row per document, in order, whatever the chunks."""

import pyarrow as pa
import pytest
import xxhash

from dedup.config import DedupConfig
from dedup.signatures import SCHEMA, signatures
from tests.dedup.corpus import table

TEXTS = ["one two three four five six", "too short", "", "ein zwei drei vier fünf", "one two three four five six"]


def test_columns():
    found = signatures(table(TEXTS), DedupConfig())
    assert found.schema == SCHEMA
    assert found["n_words"].to_pylist() == [6, 2, 0, 5, 6]
    assert found["length"].to_pylist() == [len(t.encode()) for t in TEXTS]
    bands = found["bands"].to_pylist()
    assert [len(b) for b in bands] == [14, 0, 0, 14, 14]
    assert bands[0] == bands[4] and not set(bands[0]) & set(bands[3])
    digest = xxhash.xxh3_128_digest(TEXTS[0].encode())
    low, high = found["hash_low"][0].as_py(), found["hash_high"][0].as_py()
    assert low.to_bytes(8, "little") + high.to_bytes(8, "little") == digest


def test_chunks_and_slices_do_not_matter():
    whole = table(TEXTS)
    chunked = pa.concat_tables([table(["skipped", *TEXTS[:2]]).slice(1), table(TEXTS[2:])])
    chunked = chunked.set_column(0, "doc", whole["doc"])
    assert signatures(chunked, DedupConfig()).equals(signatures(whole, DedupConfig()))


@pytest.mark.parametrize(
    ("keeper", "order"),
    [
        (["source", "length", "oldest"], [3, 2, 1, 0]),
        (["length", "source"], [2, 1, 3, 0]),
        (["source"], [3, 0, 1, 2]),
        (["oldest"], [0, 1, 2, 3]),
    ],
)
def test_rank_is_keeper_order(keeper, order):
    documents = table(["a", "bbb", "bbbb", "bb"], ["web", "blog", "web", "books"])
    config = DedupConfig(keeper=keeper, source_priority=["books"])
    found = signatures(documents, config)
    assert sorted(range(4), key=lambda d: (found["rank"][d].as_py(), d)) == order


def test_equal_length_is_decided_by_source_below_it():
    documents = table(["aa", "bb"], ["web", "books"])
    found = signatures(documents, DedupConfig(keeper=["length", "source"], source_priority=["books", "web"]))
    assert found["rank"][1].as_py() < found["rank"][0].as_py()
