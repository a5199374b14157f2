"""Signals: what is measured of every document, before any rule or score judges it.

The kernels define them: `kernels/gopher.py` (words and repetition), `kernels/lines.py` (lines, sentences, scripts). One
more: `compression`, the size under zstd level 1 over the size.
"""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import zstandard

from dataprep.storage import array_buffers
from kernels import gopher, lines

SIGNALS = (*gopher.SIGNALS, *lines.SIGNALS, "compression")


def signals(text: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """Each of SIGNALS as float32[documents], for a large_string column without nulls."""
    data, offsets = array_buffers(text)
    columns = [*gopher.signals(data, offsets).T, *lines.signals(data, offsets).T, compression(data, offsets)]
    return {name: np.ascontiguousarray(column) for name, column in zip(SIGNALS, columns, strict=True)}


def compression(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Compressed size over size, float32; 0 for an empty document. What repeats itself is small."""
    compress = zstandard.ZstdCompressor(level=1).compress
    view = data.data  # no copy
    sizes = [len(compress(view[a:b])) for a, b in pairwise(offsets.tolist())]
    whole = np.diff(offsets)
    return np.where(whole > 0, np.array(sizes, np.float64) / np.maximum(whole, 1), 0).astype(np.float32)
