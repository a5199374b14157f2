"""What reads whole columns and sums of commits: runs of values, halves of hashes, aggregates added up."""

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from dataprep.storage import add_up, hash_halves, runs


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 30), st.integers(0, 5))
def test_runs_cover_all_values_within_the_size(lengths, size, first):
    offsets = np.cumsum([first, *lengths])
    found = list(runs(offsets, size))
    assert [k for start, stop in found for k in range(start, stop)] == list(range(len(lengths)))
    for start, stop in found:
        total = sum(lengths[start:stop])
        assert stop - start == 1 or total <= size
        assert stop == len(lengths) or total + lengths[stop] > size  # as long as they can be


@given(st.lists(st.lists(st.binary(min_size=16, max_size=16), max_size=4), max_size=4), st.integers(0, 3))
def test_halves_of_hashes_in_any_chunks(chunks, skipped):
    column = pa.chunked_array([pa.array(chunk, pa.binary(16)) for chunk in chunks], pa.binary(16)).slice(skipped)
    expected = [[int.from_bytes(h[:8], "little"), int.from_bytes(h[8:], "little")] for h in column.to_pylist()]
    assert hash_halves(column).tolist() == expected


COUNTS = st.dictionaries(st.sampled_from("ab"), st.dictionaries(st.sampled_from("xyz"), st.integers(0, 9)))


@given(st.lists(COUNTS, max_size=5))
def test_aggregates_add_up(parts):
    expected = {key: Counter() for part in parts for key in part}
    for part in parts:
        for key, counts in part.items():
            expected[key].update(counts)
    before = repr(parts)
    assert add_up(parts) == expected and repr(parts) == before
