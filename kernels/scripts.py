"""The script of texts: which one most of a text's first letters belong to."""

import numpy as np

from kernels.jit import njit
from kernels.words import decode


@njit
def dominant(data, offsets, table, letters, found):
    """found[k]: the script of data[offsets[k]:offsets[k+1]] (UTF-8) by its first `letters` letters, 0 without one.

    table: uint8[code points], a letter's script, 0 = none. Of scripts as frequent as each other it is the first.
    """
    for text in range(len(found)):
        counts = np.zeros(256, np.int64)
        i, end, left = offsets[text], offsets[text + 1], letters
        while i < end and left > 0:
            code, size = decode(data, i, end)
            script = table[code]
            counts[script] += 1
            left -= script > 0
            i += size
        counts[0] = 0
        found[text] = np.argmax(counts)
