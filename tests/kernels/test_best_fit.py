"""Best-fit decreasing against its definition; the copy against slices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.best_fit import best_fit, best_fit_reference, copy_runs


@st.composite
def packings(draw):
    context = draw(st.sampled_from([1, 2, 7, 63, 64, 65, 100, 512, 4095, 4096, 4097, 300_000, 1 << 20, 1_500_001]))
    largest = draw(st.sampled_from([context, max(1, context // 3), max(1, context // 20), min(context, 4)]))
    lengths = draw(st.lists(st.integers(1, largest), max_size=60))
    return np.array(lengths, np.int64), context


def loads(bins, lengths):
    return np.bincount(bins, lengths).astype(np.int64)


@settings(max_examples=300)
@given(packings())
def test_fills_the_same_bins_as_the_definition(case):
    lengths, context = case
    bins = best_fit(lengths, context)
    assert bins.shape == lengths.shape
    got, expected = loads(bins, lengths), loads(best_fit_reference(lengths, context), lengths)
    assert (got > 0).all() and (got <= context).all()
    assert sorted(got) == sorted(expected)


def test_equal_input_gives_equal_bins_and_equal_lengths_keep_their_order():
    lengths = np.random.default_rng(0).integers(1, 40, 500)
    bins = best_fit(lengths, 100)
    assert np.array_equal(bins, best_fit(lengths.copy(), 100))
    assert list(best_fit(np.full(6, 30), 64)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("lengths", [[0], [5, 11], [-1]])
def test_impossible_lengths_are_refused(lengths):
    with pytest.raises(ValueError, match=r"1\.\.10"):
        best_fit(np.array(lengths), 10)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), max_size=20))
def test_copies_what_slices_copy(runs):
    source = np.arange(100, dtype=np.uint32)
    starts, lengths = (np.array([run[i] for run in runs], np.int64) for i in (0, 1))
    places = np.cumsum(lengths) - lengths + np.arange(len(runs))
    out = np.full(600, 999, np.uint32)
    expected = out.copy()
    for start, length, place in zip(starts, lengths, places, strict=True):
        expected[place : place + length] = source[start : start + length]
    copy_runs(source, starts, lengths, out, places)
    assert np.array_equal(out, expected)
