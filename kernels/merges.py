"""Byte-pair merges of one word: pair by pair, lowest rank first, leftmost among equals."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from kernels.jit import njit

RANK_BITS = 22
ID_BITS = 21  # two ids and a rank are one 64-bit entry of `pairs`
NO_RANK = np.uint32((1 << RANK_BITS) - 1)
FREE = np.uint64(0xFFFFFFFFFFFFFFFF)
POSITION_BITS = 10  # of a rank and a place in a word as one 32-bit key
LONG_BITS = np.uint64(40)  # of a place in a longer one
_PRIME = np.uint64(0x9E3779B97F4A7C15)


class Merges(NamedTuple):
    """Which pairs of tokens merge. rank: place in the list of merges; NO_RANK: they do not.

    byte_ids: uint32[256], the tokens of single bytes. byte_ranks: uint32[65536], the ranks of pairs of bytes.
    pairs: uint64[power of two], hash table of left << 43 | right << 22 | rank. merged: uint32, rank -> token.
    likely: uint8[power of two], a filter of bits, small enough for the CPU's cache: most pairs are not in `pairs`.
    """

    byte_ids: np.ndarray
    byte_ranks: np.ndarray
    pairs: np.ndarray
    merged: np.ndarray
    likely: np.ndarray


def reference(word: bytes, byte_ids: list[int], ranks: Mapping[tuple[int, int], tuple[int, int]]) -> list[int]:
    """The tokens of a word by the book. ranks: pair of tokens -> (rank, token it becomes)."""
    tokens = [byte_ids[b] for b in word]
    while pairs := [(ranks[p][0], k) for k, p in enumerate(itertools.pairwise(tokens)) if p in ranks]:
        _, k = min(pairs)
        tokens[k : k + 2] = [ranks[tokens[k], tokens[k + 1]][1]]
    return tokens


def make(pairs: np.ndarray, merged: np.ndarray, byte_ids: np.ndarray) -> Merges:
    """Merges from pairs uint32[n, 2] and what they become, uint32[n], both by rank."""
    table = np.full(1 << max(4, int(2.5 * len(pairs)).bit_length()), FREE)
    likely = np.zeros(len(table) >> 1, np.uint8)
    _insert_pairs(table, likely, pairs.astype(np.uint64))
    byte_ranks = np.empty(1 << 16, np.uint32)
    _rank_bytes(table, likely, byte_ids, byte_ranks)
    return Merges(byte_ids, byte_ranks, table, merged, likely)


@njit(forceinline=True)
def _places(left, right, table, likely):
    """(key, home in the table, byte, bit in the filter) of a pair."""
    key = np.uint64(left) << np.uint64(ID_BITS) | np.uint64(right)
    value = key * _PRIME
    home = np.int64((value ^ (value >> np.uint64(32))) & np.uint64(len(table) - 1))
    byte = np.int64((value >> np.uint64(36)) & np.uint64(len(likely) - 1))
    return key, home, byte, np.uint8(1) << np.uint8(value >> np.uint64(61))


@njit
def _insert_pairs(table, likely, pairs):
    for rank in range(len(pairs)):
        key, slot, byte, bit = _places(pairs[rank, 0], pairs[rank, 1], table, likely)
        while table[slot] != FREE and table[slot] >> np.uint64(RANK_BITS) != key:
            slot = (slot + 1) & (len(table) - 1)
        table[slot] = key << np.uint64(RANK_BITS) | np.uint64(rank)
        likely[byte] |= bit


@njit(forceinline=True)
def _rank(table, likely, left, right):
    key, slot, byte, bit = _places(left, right, table, likely)
    if not likely[byte] & bit:
        return NO_RANK
    while True:
        entry = table[slot]
        if entry >> np.uint64(RANK_BITS) == key:
            return np.uint32(entry & np.uint64(NO_RANK))
        if entry == FREE:
            return NO_RANK
        slot = (slot + 1) & (len(table) - 1)


@njit
def _rank_bytes(table, likely, byte_ids, ranks):
    for a in range(256):
        for b in range(256):
            ranks[a << 8 | b] = _rank(table, likely, byte_ids[a], byte_ids[b])


@njit
def merge(data, start, size, merges, scratch, out, count):
    """Append the tokens of the word data[start:start+size] to out[count:]; how many are there then.

    scratch: uint32[5, 1 << POSITION_BITS], enough for all but very long words.
    """
    if size > 1 << POSITION_BITS:
        return _merge_long(data, start, size, merges, out, count)
    tokens, after, before, keys, becomes = scratch[0], scratch[1], scratch[2], scratch[3], scratch[4]
    bits = np.uint32(POSITION_BITS)
    for k in range(size):
        tokens[k] = merges.byte_ids[data[start + k]]
        after[k] = k + 1
        before[k] = k - 1
    for k in range(size - 1):
        rank = merges.byte_ranks[np.int64(data[start + k]) << 8 | data[start + k + 1]]
        keys[k] = rank << bits | np.uint32(k)
        if rank != NO_RANK:
            becomes[k] = merges.merged[rank]
    keys[size - 1] = NO_RANK << bits
    while True:
        best = NO_RANK << bits
        for k in range(size - 1):
            best = min(best, keys[k])
        if best >> bits == NO_RANK:
            break
        here = np.int64(best & np.uint32((1 << POSITION_BITS) - 1))
        gone = after[here]
        following = after[gone]
        token = becomes[here]
        tokens[here] = token
        keys[gone] = NO_RANK << bits
        after[here] = following
        rank = NO_RANK
        if following < size:
            before[following] = here
            rank = _rank(merges.pairs, merges.likely, token, tokens[following])
            if rank != NO_RANK:
                becomes[here] = merges.merged[rank]  # fetched now, so that nobody waits for it later
        keys[here] = rank << bits | np.uint32(here)
        if here > 0:
            previous = before[here]
            rank = _rank(merges.pairs, merges.likely, tokens[previous], token)
            keys[previous] = rank << bits | np.uint32(previous)
            if rank != NO_RANK:
                becomes[previous] = merges.merged[rank]
    place = np.int64(0)
    while place < size:
        out[count] = tokens[place]
        count += 1
        place = np.int64(after[place])
    return count


@njit
def _merge_long(data, start, size, merges, out, count):
    """The same for a word of any size: the lowest key of every block is kept, so a merge costs about sqrt(size)."""
    none = np.uint64(NO_RANK) << LONG_BITS
    block = int(np.sqrt(size)) + 1
    lowest = np.full(size // block + 1, none)
    keys = np.full(size + 1, none)
    tokens = np.empty(size, np.uint32)
    after = np.arange(1, size + 1)
    before = np.arange(-1, size - 1)
    for k in range(size):
        tokens[k] = merges.byte_ids[data[start + k]]
        if k < size - 1:
            rank = merges.byte_ranks[np.int64(data[start + k]) << 8 | data[start + k + 1]]
            keys[k] = np.uint64(rank) << LONG_BITS | np.uint64(k)
            lowest[k // block] = min(lowest[k // block], keys[k])
    while True:
        best = lowest.min()
        rank = best >> LONG_BITS
        if rank == NO_RANK:
            break
        here = np.int64(best & np.uint64((1 << int(LONG_BITS)) - 1))
        gone = after[here]
        following = after[gone]
        tokens[here] = merges.merged[rank]
        after[here] = following
        keys[gone] = keys[here] = none
        if following < size:
            before[following] = here
            ranked = np.uint64(_rank(merges.pairs, merges.likely, tokens[here], tokens[following]))
            keys[here] = ranked << LONG_BITS | np.uint64(here)
        if here > 0:
            previous = before[here]
            ranked = np.uint64(_rank(merges.pairs, merges.likely, tokens[previous], tokens[here]))
            keys[previous] = ranked << LONG_BITS | np.uint64(previous)
            lowest[previous // block] = keys[previous // block * block : (previous // block + 1) * block].min()
        lowest[here // block] = keys[here // block * block : (here // block + 1) * block].min()
        lowest[gone // block] = keys[gone // block * block : (gone // block + 1) * block].min()
    place = 0
    while place < size:
        out[count] = tokens[place]
        count += 1
        place = after[place]
    return count
