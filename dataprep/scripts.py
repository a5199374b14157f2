"""Unicode scripts of texts, for counts by script."""

import functools

import numpy as np
import pyarrow as pa

from dataprep.pretokenizer import members
from dataprep.storage import array_buffers
from kernels import scripts

SCRIPTS = (
    "no letters", "Latin", "Han", "Kana", "Hangul", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali",
    "Gurmukhi", "Gujarati", "Tamil", "Telugu", "Kannada", "Malayalam", "Sinhala", "Thai", "Lao", "Tibetan", "Myanmar",
    "Khmer", "Georgian", "Armenian", "Ethiopic", "other",
)  # fmt: skip
LETTERS = 1000  # of a text are looked at


@functools.cache
def table() -> np.ndarray:
    """uint8[CODE_POINTS]: a letter's index in SCRIPTS, by the library's version of Unicode."""
    result = np.where(members(r"\p{L}"), len(SCRIPTS) - 1, 0).astype(np.uint8)
    for number, name in enumerate(SCRIPTS[1:-1], 1):
        letters = members(r"[\p{Hiragana}\p{Katakana}]" if name == "Kana" else rf"\p{{{name}}}")
        result[letters & (result > 0)] = number
    return result


def scripts_of(texts: pa.ChunkedArray | pa.Array) -> pa.DictionaryArray:
    """The script of each text of a large_string column, by its first LETTERS letters."""
    data, offsets = array_buffers(texts)
    found = np.empty(len(texts), np.int32)
    scripts.dominant(data, offsets, table(), LETTERS, found)
    return pa.DictionaryArray.from_arrays(found, pa.array(SCRIPTS))
