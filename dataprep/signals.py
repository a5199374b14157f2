"""Signals: what is measured of every document, before any rule or score judges it.

The kernels define them: `kernels/gopher.py` (words and repetition), `kernels/lines.py` (lines, sentences, scripts). Two
more: `compression`, the size under zstd level 1 over the size, and `bad_words`, how often words and phrases of a list
occur (NaN without a list).
"""

from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
import zstandard

from dataprep.phrases import Phrases
from dataprep.storage import UserError, array_buffers, read_bytes
from kernels import gopher, lines

SIGNALS = (*gopher.SIGNALS, *lines.SIGNALS, "compression", "bad_words")


def signals(text: pa.ChunkedArray, bad_words: str | None = None) -> dict[str, np.ndarray]:
    """Each of SIGNALS as float32[documents], for a large_string column without nulls. bad_words: path of a list."""
    data, offsets = array_buffers(text)
    columns = [
        *gopher.signals(data, offsets).T,
        *lines.signals(data, offsets).T,
        compression(data, offsets),
        occurrences(text, bad_words),
    ]
    return {name: np.ascontiguousarray(column) for name, column in zip(SIGNALS, columns, strict=True)}


def compression(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Compressed size over size, float32; 0 for an empty document. What repeats itself is small."""
    compress = zstandard.ZstdCompressor(level=1).compress
    view = data.data  # no copy
    sizes = [len(compress(view[a:b])) for a, b in pairwise(offsets.tolist())]
    whole = np.diff(offsets)
    return np.where(whole > 0, np.array(sizes, np.float64) / np.maximum(whole, 1), 0).astype(np.float32)


def occurrences(text: pa.ChunkedArray, path: str | None) -> np.ndarray:
    """How often words and phrases of the list occur in each document, float32; NaN without a list."""
    if path is None:
        return np.full(len(text), np.nan, np.float32)
    counts = np.zeros(len(text), np.int64)
    for documents, _ in load_phrases(path).find(text):
        counts += np.bincount(documents, minlength=len(text))
    return counts.astype(np.float32)


@lru_cache(1)
def load_phrases(path: str) -> Phrases:
    """A list of words and phrases, one per line. UserError where it is missing, no UTF-8 or empty."""
    try:
        lines_of_file = read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"quality.bad_words: {path} cannot be read as UTF-8 text ({error}); name a list") from None
    phrases = Phrases.of(lines_of_file)
    if not len(phrases.keys):
        raise UserError(
            f"quality.bad_words: {path} holds no word; write one word or phrase per line, or set it to null"
        )
    return phrases
