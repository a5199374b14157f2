"""Byte-level BPE: pieces of UTF-8 text, as a scanner's tables cut them, to token ids, with a cache of words.

A word is looked up in one table of open addressing, whose slots hold the bytes of short words themselves; it starts
out with the vocabulary (the tokens that their own bytes merge to), and goes back to that when it is full. Other words
are merged (`kernels.merges`).
"""

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kernels.jit import njit
from kernels.merges import POSITION_BITS, merge
from kernels.scan import pieces

SHORT = 15  # bytes of a word that a slot holds, beside its length
BATCH = 256  # words looked up together
LONGEST_CACHED = 64  # longer words hardly ever come again
LOW = np.uint64(0xFFFFFFFF)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xFF51AFD7ED558CCD)
_intrinsic: Any = intrinsic  # the code generator supplies the first argument, which a type checker cannot know


class Cache(NamedTuple):
    """Words and their tokens. A slot is four uint64: two of key, two of value; the second of a free slot is 0.

    Up to 15 bytes: the bytes, the length on top; then up to three ids of 32 bits and, on top, how many; were they
    more, their place in `ids` is in the third's stead. Longer: hash, length and mark; place in `keys`, then as above.
    used: int64[3], entries, ids, bytes.
    """

    slots: np.ndarray
    ids: np.ndarray
    keys: np.ndarray
    used: np.ndarray


def empty_cache(slots: int, ids: int, keys: int) -> Cache:
    """Room for `slots` (a power of two) words, ids that do not fit in a slot, and bytes of long words."""
    arrays = np.zeros(4 * slots, np.uint64), np.zeros(ids, np.uint32), np.zeros(keys, np.uint8), np.zeros(3, np.int64)
    return Cache(*arrays)


@_intrinsic
def _load8(_context, data, index):
    """Eight bytes of `data` from `index` as one uint64, wherever they lie; nothing checks that they exist."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.gep(array.data, [arguments[1]])
        value = builder.load(builder.bitcast(address, ir.IntType(64).as_pointer()))
        value.align = 1
        return value

    return types.uint64(data, types.intp), generate


@njit(forceinline=True)
def _key(data, start, size):
    """(key, key, hash) of the word data[start:start+size] as its slot has them."""
    first = second = np.uint64(0)
    if size > SHORT:
        second = np.uint64(0xFF) << np.uint64(56) | np.uint64(size)
        for k in range(start, start + size - 7, 8):
            first = (first ^ _load8(data, k)) * _PRIME
            first ^= first >> np.uint64(29)
        first = (first ^ _load8(data, start + size - 8)) * _PRIME
    elif start + 16 <= len(data):
        first = _load8(data, start)
        second = _load8(data, start + 8)
        if size < 8:
            first &= (np.uint64(1) << np.uint64(8 * size)) - np.uint64(1)
            second = np.uint64(0)
        else:
            second &= (np.uint64(1) << np.uint64(8 * (size - 8))) - np.uint64(1)
        second |= np.uint64(size) << np.uint64(56)
    else:
        for k in range(size):
            if k < 8:
                first |= np.uint64(data[start + k]) << np.uint64(8 * k)
            else:
                second |= np.uint64(data[start + k]) << np.uint64(8 * (k - 8))
        second |= np.uint64(size) << np.uint64(56)
    value = (first ^ (second * _MIX)) * _PRIME
    return first, second, value ^ (value >> np.uint64(32))


@njit(forceinline=True)
def _find(data, start, size, first, second, value, cache):
    """The index in cache.slots of a word's slot, or of the free slot where it would be."""
    mask = np.uint64((len(cache.slots) >> 2) - 1)
    slot = value & mask
    while True:
        at = np.int64(slot) << 2
        if cache.slots[at + 1] == second and cache.slots[at] == first:
            if size <= SHORT:
                return at
            key = np.int64(cache.slots[at + 2])
            same = True
            for k in range(size):
                same &= cache.keys[key + k] == data[start + k]
            if same:
                return at
        elif cache.slots[at + 1] == 0:
            return at
        slot = (slot + np.uint64(1)) & mask


@njit
def _has_room(cache, size, tokens):
    entries, ids, keys = cache.used
    room = entries < len(cache.slots) // 6  # two thirds of them
    return room and ids + tokens <= len(cache.ids) and keys + size <= len(cache.keys)


@njit
def _remember(data, start, size, first, second, at, tokens, cache):
    """Fill the free slot `at`."""
    slots, used = cache.slots, cache.used
    slots[at] = first
    slots[at + 1] = second
    count = len(tokens)
    third = np.uint64(0)
    if size <= SHORT and count <= 3:
        slots[at + 2] = np.uint64(tokens[0])
        if count > 1:
            slots[at + 2] |= np.uint64(tokens[1]) << np.uint64(32)
        if count > 2:
            third = np.uint64(tokens[2])
    else:
        third = np.uint64(used[1])
        cache.ids[used[1] : used[1] + count] = tokens
        used[1] += count
    if size > SHORT:
        slots[at + 2] = np.uint64(used[2])
        cache.keys[used[2] : used[2] + size] = data[start : start + size]
        used[2] += size
    slots[at + 3] = np.uint64(count) << np.uint64(32) | third
    used[0] += 1


@njit
def seed(data, offsets, tokens, merges, verbatim, cache):
    """Put the vocabulary into the cache: words data[offsets[k]:offsets[k+1]] that are merged to tokens[k] alone.

    verbatim: all, as with `ignore_merges`. The cache must have room.
    """
    scratch = np.empty((5, 1 << POSITION_BITS), np.uint32)
    found = np.empty(len(data) + 1, np.uint32)
    for k in range(len(tokens)):
        start, size = offsets[k], offsets[k + 1] - offsets[k]
        count = 1
        if not verbatim:
            count = merge(data, start, size, merges, scratch, found, 0)
        if verbatim or (count == 1 and found[0] == tokens[k]):
            first, second, value = _key(data, start, size)
            at = _find(data, start, size, first, second, value, cache)
            _remember(data, start, size, first, second, at, tokens[k : k + 1], cache)


@njit
def _append_new(data, start, size, merges, cache, seeded, scratch, out, total):
    """Append the tokens of a word that is not in the cache to out[total:]; how many are there then."""
    count = merge(data, start, size, merges, scratch, out, total) - total
    if size <= LONGEST_CACHED:
        if not _has_room(cache, size, count):
            cache.slots[:] = seeded.slots
            cache.used[:] = seeded.used  # what lies beyond in `ids` and `keys` is overwritten
        first, second, value = _key(data, start, size)
        slot = _find(data, start, size, first, second, value, cache)
        _remember(data, start, size, first, second, slot, out[total : total + count], cache)
    return total + count


@njit
def encode(data, bounds, added, scanners, merges, cache, seeded, out, counts):
    """Append the tokens of the texts data[bounds[k]:bounds[k+1]], valid UTF-8, to `out`; counts[k]: how many.

    added[k]: the one token that the text is, or -1. out: uint32, with room for one token per byte and three more.
    seeded: the cache to go back to when `cache` is full. Returns how many tokens there are.
    """
    levels = max(1, len(scanners.first))
    begins, stops = np.empty(levels, np.int64), np.empty(levels, np.int64)
    scratch = np.empty((5, 1 << POSITION_BITS), np.uint32)
    ends = np.empty(BATCH, np.int64)
    total = np.int64(0)
    for text in range(len(counts)):
        before, start, level = total, bounds[text], 0
        begins[0], stops[0] = start, bounds[text + 1]
        if added[text] >= 0:
            out[total] = added[text]
            total += 1
            level = -1
        while level >= 0:
            found, level = pieces(data, scanners, level, begins, stops, ends)
            # Looked up together, words do not wait for each other's slots to arrive from memory.
            for word in range(found):
                size = ends[word] - start
                first, second, value = _key(data, start, size)
                slot = _find(data, start, size, first, second, value, cache)
                pair, third = cache.slots[slot + 2], cache.slots[slot + 3]
                count = np.int64(third >> np.uint64(32))
                if cache.slots[slot + 1] == 0:
                    total = _append_new(data, start, size, merges, cache, seeded, scratch, out, total)
                elif size <= SHORT and count <= 3:
                    out[total] = np.uint32(pair & LOW)
                    out[total + 1] = np.uint32(pair >> np.uint64(32))
                    out[total + 2] = np.uint32(third & LOW)
                    total += count
                else:
                    for k in range(count):
                        out[total + k] = cache.ids[np.int64(third & LOW) + k]
                    total += count
                start += size
        counts[text] = total - before
    return total
