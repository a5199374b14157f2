"""Which texts may change under Unicode's canonical composition (NFC): a quick check that errs on the safe side."""

import numpy as np

from kernels.jit import njit
from kernels.words import decode

# What a table of kinds says of a character. Bits:
MARK = 1  # not a starter: has a combining class
SECOND = 2  # composes with some character before it
DECOMPOSES = 4  # has a canonical decomposition, so that a mark behind it may belong inside
CHANGES = 8  # not allowed in NFC, or too rare to look closer


@njit
def _is_pair(pairs, first, second):
    key = np.uint64(first) << np.uint64(32) | np.uint64(second)
    at = np.searchsorted(pairs, key)
    return at < len(pairs) and pairs[at] == key


@njit
def may_change(data, bounds, kinds, pairs, found):
    """found[k] = whether NFC might change the text data[bounds[k]:bounds[k+1]], which is valid UTF-8.

    kinds: uint8[code points]; pairs: sorted uint64, first << 32 | second of all characters that compose.
    """
    for text in range(len(bounds) - 1):
        i, end = bounds[text], bounds[text + 1]
        before, kind_before = np.uint32(0), np.uint8(0)
        found[text] = False
        while i < end:
            code, size = np.uint32(data[i]), 1
            if code >= 0x80:
                code, size = decode(data, i, end)
            kind = kinds[code]
            if kind & np.uint8(MARK | SECOND | CHANGES) and (
                kind & np.uint8(CHANGES)
                or kind_before & np.uint8(MARK)
                or (kind & np.uint8(SECOND) and (kind_before & np.uint8(DECOMPOSES) or _is_pair(pairs, before, code)))
            ):
                found[text] = True
                break
            before, kind_before = code, kind
            i += size
