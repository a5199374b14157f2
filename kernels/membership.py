"""Which of many hashes belong to a set: a bitmap turns nearly all others away, a binary search decides."""

import numpy as np

from kernels.jit import njit

BITS_PER_KEY = 16  # one hash in sixteen that does not belong gets as far as the search
_LOW = np.uint64(7)


@njit
def bitmap(keys):
    """The filter of a set of hashes (uint64): uint8, a power of two of them."""
    size = 1 << 10
    while size * 8 < len(keys) * BITS_PER_KEY:
        size *= 2
    bits = np.zeros(size, np.uint8)
    mask = np.uint64(size * 8 - 1)
    for key in keys:
        place = key & mask
        bits[place >> np.uint64(3)] |= np.uint8(1 << (place & _LOW))
    return bits


@njit
def members(values, keys, bits):
    """(places in values, places in keys) of all values that are keys, in the values' order.

    values: uint64; keys: uint64, sorted, without repeats; bits: their `bitmap`.
    """
    mask = np.uint64(len(bits) * 8 - 1)
    count = 0
    places, found = np.empty(1024, np.int64), np.empty(1024, np.int64)
    for i in range(len(values)):
        place = values[i] & mask
        if bits[place >> np.uint64(3)] >> (place & _LOW) & 1:
            k = np.searchsorted(keys, values[i])
            if k < len(keys) and keys[k] == values[i]:
                if count == len(places):
                    places = np.concatenate((places, np.empty_like(places)))
                    found = np.concatenate((found, np.empty_like(found)))
                places[count], found[count] = i, k
                count += 1
    return places[:count], found[:count]
