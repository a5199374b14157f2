"""A linear classifier over hashed word n-grams: scores of documents, and one epoch of training (Joulin et al. 2016).

A document's features are its words and pairs of neighbouring words, each hashed to a row of a table whose length is a
power of two. Its score is the mean of their rows. In training a row is an embedding and *heads* turn the mean into
outputs; for scoring both are multiplied out, so that a row holds what its n-gram adds to each output.
"""

from collections.abc import Iterator

import numpy as np

from kernels.jit import njit
from kernels.words import Folding, mix, reference_hash, reference_words

FOLDING: Folding = "candidate"  # digits are alike, accents dropped: fewer, better known words
_PAIR = np.uint64(0x9E3779B97F4A7C15)
_EPSILON = np.float32(1e-8)
_HEAD_RATE = np.float32(0.1)  # heads and bias learn so much slower than embeddings, whose steps AdaGrad has scaled


def reference_rows(text: str, size: int) -> Iterator[int]:
    """The table rows of a document's words and pairs of words, in a table of `size` rows."""
    before = None
    for word in reference_words(text, FOLDING):
        value = reference_hash(word)
        yield value % size
        if before is not None:
            pair = (before * int(_PAIR) + value) % 2**64
            yield int(mix(np.uint64(pair))) % size
        before = value


@njit
def _pair_row(before, word, mask):
    return np.int64(mix(before * _PAIR + word) & mask)


@njit
def means(words, offsets, table):
    """float32[documents, outputs]: the mean row of each document's n-grams; zeros where it has no word.

    words: uint64 hashes; offsets: int64, one more than documents; table: float32[power of two, outputs].
    """
    outputs = table.shape[1]
    mask = np.uint64(len(table) - 1)
    result = np.zeros((len(offsets) - 1, outputs), np.float32)
    total = np.empty(outputs, np.float64)
    for d in range(len(result)):
        start, end = offsets[d], offsets[d + 1]
        total[:] = 0
        for w in range(start, end):
            row = table[np.int64(words[w] & mask)]
            for k in range(outputs):
                total[k] += row[k]
            if w > start:
                row = table[_pair_row(words[w - 1], words[w], mask)]
                for k in range(outputs):
                    total[k] += row[k]
        if end > start:
            result[d] = total / (2 * (end - start) - 1)
    return result


@njit
def chances(logits, singles, result):
    """Fill `result` with probabilities: a logistic for the first `singles` outputs, one softmax over the others."""
    for k in range(singles):
        result[k] = 1 / (1 + np.exp(-logits[k]))
    if singles < len(logits):
        others = np.exp(logits[singles:] - logits[singles:].max())
        result[singles:] = others / others.sum()


@njit
def _rows(words, start, end, mask, rows):
    """Fill `rows` with the table rows of one document's n-grams; returns how many there are."""
    used = 0
    for w in range(start, end):
        rows[used] = np.int64(words[w] & mask)
        used += 1
        if w > start:
            rows[used] = _pair_row(words[w - 1], words[w], mask)
            used += 1
    return used


@njit
def train_epoch(words, offsets, order, targets, singles, embeddings, heads, bias, squares, rate):
    """One pass of stochastic gradient descent over the documents in `order`; returns the mean loss per target.

    targets: float32[documents, outputs] in 0..1, NaN where there is none; the first `singles` outputs stand alone
    (cross entropy with a logistic), the others are one softmax. embeddings float32[power of two, dimensions], heads
    float32[dimensions, outputs] and bias float32[outputs] change in place; squares float32[len(embeddings)] holds
    each row's sum of squared gradients (AdaGrad by row: rare words learn as fast as frequent ones; the gradients are
    those of the sum, not of the mean, lest long documents teach nothing).
    """
    dimensions, outputs = heads.shape
    mask = np.uint64(len(embeddings) - 1)
    hidden, back = np.empty(dimensions, np.float32), np.empty(dimensions, np.float32)
    logits, guess, error = np.empty(outputs, np.float32), np.empty(outputs, np.float32), np.empty(outputs, np.float32)
    rows = np.empty(2 * (offsets[1:] - offsets[:-1]).max(), np.int64)
    loss, count = 0.0, 0
    for d in order:
        used = _rows(words, offsets[d], offsets[d + 1], mask, rows)
        if used == 0:
            continue
        hidden[:] = 0
        for r in rows[:used]:
            for j in range(dimensions):
                hidden[j] += embeddings[r, j]
        hidden /= np.float32(used)
        for k in range(outputs):
            logits[k] = bias[k]
            for j in range(dimensions):
                logits[k] += hidden[j] * heads[j, k]
        chances(logits, singles, guess)
        for k in range(outputs):
            target, error[k] = targets[d, k], 0
            if not np.isnan(target):
                error[k] = guess[k] - target
                loss -= target * np.log(guess[k] + _EPSILON)
                if k < singles:
                    loss -= (1 - target) * np.log(1 - guess[k] + _EPSILON)
                count += k <= singles  # a softmax is one target
        back[:] = 0
        for k in range(outputs):
            bias[k] -= rate * _HEAD_RATE * error[k]
            for j in range(dimensions):
                back[j] += heads[j, k] * error[k]
                heads[j, k] -= rate * _HEAD_RATE * hidden[j] * error[k]
        square = (back * back).sum() / np.float32(dimensions)
        for r in rows[:used]:
            squares[r] += square
            step = rate / np.sqrt(squares[r] + _EPSILON)
            for j in range(dimensions):
                embeddings[r, j] -= step * back[j]
    return loss / max(1, count)
