"""Shingles, signatures and band keys against their references; estimates against true Jaccard and datasketch."""

from itertools import pairwise

import datasketch
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import minhash

WORD = st.integers(0, 2**64 - 1)


def flat(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([w for d in documents for w in d], np.uint64), np.cumsum([0, *map(len, documents)])


@settings(max_examples=50)
@given(documents=st.lists(st.lists(WORD, max_size=12), min_size=1, max_size=5), n=st.integers(1, 6))
def test_kernels_equal_their_references(documents, n):
    words, offsets = flat(documents)
    multipliers, addends = minhash.permutations(19, seed=3)
    values, starts = minhash.shingles(words, offsets, n)
    assert [values[a:b].tolist() for a, b in pairwise(starts)] == [minhash.reference_shingles(d, n) for d in documents]
    assert minhash.signatures(words, offsets, n, multipliers, addends).tolist() == [
        minhash.reference_signature(d, n, multipliers.tolist(), addends.tolist()) for d in documents
    ]


@pytest.mark.parametrize("length", [511, 512, 515, 516, 517, 1300])
def test_documents_longer_than_a_block(length):
    words = np.random.default_rng(length).integers(0, 2**63, length).astype(np.uint64)
    multipliers, addends = minhash.permutations(8, seed=0)
    found = minhash.signatures(words, np.array([0, length]), 5, multipliers, addends)
    reference = minhash.reference_signature(words.tolist(), 5, multipliers.tolist(), addends.tolist())
    assert found.tolist() == [reference]


def test_word_order_matters_and_repeats_do_not():
    words, offsets = flat([[1, 2, 3], [3, 2, 1], [2, 1, 3], [7, 7, 7], [7] * 50])
    values, starts = minhash.shingles(words, offsets, 3)
    assert len(set(values[starts[:3]].tolist())) == 3
    signatures = minhash.signatures(words, offsets, 3, *minhash.permutations(16, seed=1))
    assert (signatures[3] == signatures[4]).all() and (signatures[0] != signatures[1]).any()


def test_estimates_are_as_good_as_datasketchs():
    """Root mean square error over random pairs of sets: about sqrt(J (1 - J) / 112), as for ideal permutations."""
    random = np.random.default_rng(0)
    permutations = 112
    multipliers, addends = minhash.permutations(permutations, seed=5)
    errors, oracle_errors, ideal = [], [], []
    for pair in range(240):
        size, truth = int(random.integers(20, 800)), random.uniform(0.2, 0.98)
        shared = round(size * 2 * truth / (1 + truth))
        # Half of the pairs are runs of small numbers, which a weak hash would not spread.
        pool = random.integers(0, 2**63, 2 * size - shared) if pair % 2 else np.arange(2 * size - shared)
        a, b = pool[:size], pool[size - shared :]
        jaccard = shared / (2 * size - shared)
        words, offsets = flat([minhash.mix(s.astype(np.uint64)).tolist() for s in (a, b)])
        one, other = minhash.signatures(words, offsets, 1, multipliers, addends)
        errors.append((one == other).mean() - jaccard)
        sketches = [datasketch.MinHash(permutations, seed=pair + 1) for _ in (a, b)]
        for sketch, values in zip(sketches, (a, b), strict=True):
            sketch.update_batch([v.tobytes() for v in values])
        oracle_errors.append(sketches[0].jaccard(sketches[1]) - jaccard)
        ideal.append(jaccard * (1 - jaccard) / permutations)
    error, oracle, expected = (np.sqrt(np.mean(np.square(e))) for e in (errors, oracle_errors, np.sqrt(ideal)))
    assert error < 1.2 * expected and error < 1.3 * oracle
    assert abs(np.mean(errors)) < 4 * expected / np.sqrt(len(errors))  # unbiased
    assert np.std(errors) > 0.5 * expected  # not by always saying the same


def test_permutations_depend_on_the_seed_and_are_invertible():
    (a, b), (a2, _) = minhash.permutations(112, seed=0), minhash.permutations(112, seed=1)
    assert (a % 2 == 1).all() and len(set(a.tolist())) == 112 and len(set(b.tolist())) == 112
    assert not set(a.tolist()) & set(a2.tolist())


def test_a_band_key_stands_for_its_rows_and_its_place():
    minima = np.array([[1, 2, 1, 2], [1, 2, 9, 2], [2, 1, 1, 2]], np.uint32)
    keys = minhash.band_keys(minima, 2, 2, 0)
    assert keys[0, 0] == keys[1, 0] and keys[0, 1] == keys[2, 1]
    assert len(set(keys.ravel().tolist())) == 4
    assert not set(keys.ravel().tolist()) & set(minhash.band_keys(minima, 2, 2, 1).ravel().tolist())
