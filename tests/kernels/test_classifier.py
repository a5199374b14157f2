"""The classifier's kernels against plain Python: rows of n-grams, means, and the gradients of training."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.classifier import FOLDING, chances, means, reference_rows, train_epoch
from kernels.words import word_hashes

SIZE = 256


def hashed(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    data = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, data)]).astype(np.int64)
    return word_hashes(np.frombuffer(b"".join(data), np.uint8), offsets, FOLDING)


@settings(max_examples=60)
@given(st.lists(st.text("ab é漢字.,1 ก\n", max_size=40), min_size=1, max_size=4))
def test_means_are_those_of_the_reference(texts):
    table = np.random.default_rng(0).normal(size=(SIZE, 3)).astype(np.float32)
    found = means(*hashed(texts), table)
    for row, text in zip(found, texts, strict=True):
        rows = list(reference_rows(text, SIZE))
        wanted = table[rows].mean(axis=0, dtype=np.float64) if rows else np.zeros(3)
        np.testing.assert_allclose(row, wanted, rtol=1e-5, atol=1e-6)


def test_word_order_counts_and_case_does_not():
    table = np.random.default_rng(0).normal(size=(SIZE, 1)).astype(np.float32)
    a, b, c = means(*hashed(["one two three", "One TWO three", "three two one"]), table)[:, 0]
    assert a == b and a != c


def loss(parameters, rows, target, singles):
    embeddings, heads, bias = parameters
    logits = embeddings[rows].mean(axis=0) @ heads + bias
    guess = np.empty(len(logits))
    chances(logits, singles, guess)
    total = -np.nansum(target * np.log(guess))
    return total - np.nansum((1 - target[:singles]) * np.log(1 - guess[:singles]))


@pytest.mark.parametrize("target", [[0.3, 1, 0, 0, 1], [np.nan, 0, np.nan, np.nan, np.nan], [np.nan, np.nan, 1, 0, 0]])
def test_a_step_goes_down_the_gradient(target):
    """One document: the change of every parameter against finite differences of the loss, in float64."""
    rng = np.random.default_rng(1)
    target, singles, text = np.array(target), 2, "a b a c"
    rows = list(reference_rows(text, SIZE))
    before = [rng.normal(size=shape) for shape in ((SIZE, 4), (4, 5), (5,))]
    after = [a.astype(np.float32) for a in before]
    squares, rate = np.full(SIZE, 1e4, np.float32), np.float32(1)
    reported = train_epoch(
        *hashed([text]), np.array([0]), target[None].astype(np.float32), singles, *after, squares, rate
    )
    known = np.count_nonzero(~np.isnan(target[: singles + 1]))
    assert reported == pytest.approx(loss(before, rows, target, singles) / known, rel=1e-4)
    for which, scale in ((0, 100 / len(rows)), (1, 10.0), (2, 10.0)):
        places = [tuple(p) for p in np.argwhere(np.ones_like(before[which]))]
        for place in places if which else [(r, j) for r in set(rows) for j in range(4)]:
            shifted = [a.copy() for a in before]
            shifted[which][place] += 1e-5
            slope = (loss(shifted, rows, target, singles) - loss(before, rows, target, singles)) / 1e-5
            change = float(after[which][place]) - float(np.float32(before[which][place]))
            # Embeddings: the root of `squares`, and the gradient of the sum, not of the mean. Heads: their slower pace.
            assert -change * scale == pytest.approx(slope, rel=0.05, abs=0.02)
    untouched = np.setdiff1d(np.arange(SIZE), rows)
    assert np.array_equal(after[0][untouched], before[0][untouched].astype(np.float32))


def test_documents_without_words_teach_nothing():
    arrays = [np.ones(shape, np.float32) for shape in ((SIZE, 2), (2, 1), (1,), (SIZE,))]
    words, offsets = hashed(["...", ""])
    assert train_epoch(words, offsets, np.arange(2), np.ones((2, 1), np.float32), 1, *arrays, np.float32(1)) == 0
    assert all((a == 1).all() for a in arrays)
