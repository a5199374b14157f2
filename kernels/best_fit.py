"""Best-fit-decreasing bin packing of document lengths into sequences, and the copy that fills the sequences."""

import numpy as np

from kernels.jit import njit

# Index of a word's lowest set bit, by a de Bruijn sequence: numba has no count-trailing-zeros.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_LOWEST = np.zeros(64, np.int64)
for _bit in range(64):
    _LOWEST[((0x03F79D71B4CB0A89 << _bit) & 0xFFFFFFFFFFFFFFFF) >> 58] = _bit


def best_fit(lengths: np.ndarray, context: int) -> np.ndarray:
    """The bin (int64, from 0) of each item, in bins of `context`.

    Longest first, each item goes where it leaves the least space. Ties follow the items' order, so equal input gives
    equal bins. Raises ValueError for a length outside 1..context.
    """
    lengths = np.ascontiguousarray(lengths, np.int64)
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= context):
        raise ValueError(f"lengths must lie in 1..{context}, not {lengths.min()}..{lengths.max()}")
    return _best_fit(lengths, context)


def best_fit_reference(lengths: np.ndarray, context: int) -> np.ndarray:
    """The same by definition, item by item: as many bins, with the same space left over."""
    space: list[int] = []
    bins = np.empty(len(lengths), np.int64)
    for item in np.argsort(-np.asarray(lengths, np.int64), kind="stable"):
        fitting = [b for b in range(len(space)) if space[b] >= lengths[item]]
        if fitting:
            best = min(fitting, key=lambda b: space[b])
        else:
            best = len(space)
            space.append(context)
        space[best] -= int(lengths[item])
        bins[item] = best
    return bins


@njit
def copy_runs(source: np.ndarray, starts: np.ndarray, lengths: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
    """For every i: out[places[i] : places[i] + lengths[i]] = source[starts[i] : starts[i] + lengths[i]]."""
    for i in range(len(starts)):
        for j in range(lengths[i]):
            out[places[i] + j] = source[starts[i] + j]


@njit
def _best_fit(lengths, context):
    """Bins of equal space are one stack. A run of equal lengths fills a bin with as many as fit at a time."""
    order, run_ends = _by_decreasing_length(lengths, context)
    bins = np.empty(len(lengths), np.int64)
    top = np.full(context + 1, -1, np.int64)  # by space left: the last bin put there
    below = np.empty(len(lengths), np.int64)  # the bin under it
    levels, sets = _empty_set(context + 1)  # the spaces whose stacks are not empty
    opened = 0
    item = 0
    while item < len(order):
        length = lengths[order[item]]
        run_end = run_ends[length]
        while item < run_end:
            space = _next(levels, sets, length)
            if space < 0:
                bin_, space = opened, context
                opened += 1
            else:
                bin_ = top[space]
                top[space] = below[bin_]
                if top[space] < 0:
                    _remove(levels, sets, space)
            fitting = min(space // length, run_end - item)
            for _ in range(fitting):
                bins[order[item]] = bin_
                item += 1
            space -= fitting * length
            if space > 0:
                if top[space] < 0:
                    _add(levels, sets, space)
                below[bin_] = top[space]
                top[space] = bin_
    return bins


@njit
def _by_decreasing_length(lengths, context):
    """(items, longest first and stable; for each length the end of its run in them)."""
    ends = np.zeros(context + 2, np.int64)
    for length in lengths:
        ends[length] += 1
    for length in range(context - 1, -1, -1):
        ends[length] += ends[length + 1]
    order = np.empty(len(lengths), np.int64)
    places = ends.copy()
    for item in range(len(lengths) - 1, -1, -1):
        places[lengths[item]] -= 1
        order[places[lengths[item]]] = item
    return order, ends


# A set of small integers as a tree of 64-bit words: bit b of a word says that word b below it is not empty. `levels`
# holds where each level starts in `words`, the leaves first.


@njit
def _empty_set(size):
    levels = np.zeros(12, np.int64)
    depth = 0
    while True:
        size = (size + 63) // 64
        levels[depth + 1] = levels[depth] + size
        depth += 1
        if size == 1:
            return levels[:depth], np.zeros(levels[depth], np.uint64)


@njit
def _add(levels, words, value):
    for level in levels:
        words[level + (value >> 6)] |= np.uint64(1) << np.uint64(value & 63)
        value >>= 6


@njit
def _remove(levels, words, value):
    for level in levels:
        words[level + (value >> 6)] &= ~(np.uint64(1) << np.uint64(value & 63))
        if words[level + (value >> 6)]:
            return
        value >>= 6


@njit
def _next(levels, words, value):
    """The smallest member >= value, or -1."""
    for depth in range(len(levels)):
        word = value >> 6
        end = levels[depth + 1] if depth + 1 < len(levels) else len(words)
        if levels[depth] + word >= end:
            return -1
        rest = words[levels[depth] + word] >> np.uint64(value & 63)
        if rest:
            found = value + _lowest(rest)
            for lower in range(depth - 1, -1, -1):
                found = (found << 6) + _lowest(words[levels[lower] + found])
            return found
        value = word + 1
    return -1


@njit
def _lowest(word):
    return _LOWEST[((word & (~word + np.uint64(1))) * _DE_BRUIJN) >> np.uint64(58)]
