"""Unicode scripts of texts, for counts by script."""

import functools
import unicodedata

import numpy as np
import pyarrow as pa

from dataprep.pretokenizer import CODE_POINTS
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
    """uint8[CODE_POINTS]: a letter's index in SCRIPTS, by the first word of its name."""
    words = {name.upper(): number for number, name in enumerate(SCRIPTS)}
    words |= {"CJK": words["HAN"], "HIRAGANA": words["KANA"], "KATAKANA": words["KANA"]}
    result = np.zeros(CODE_POINTS, np.uint8)
    for code in range(0x20000):
        if unicodedata.category(char := chr(code)).startswith("L"):
            result[code] = words.get(unicodedata.name(char, "").split(" ")[0], words["OTHER"])
    result[0x20000:0x40000] = words["HAN"]  # planes of ideographs alone
    return result


def scripts_of(texts: pa.ChunkedArray | pa.Array) -> pa.DictionaryArray:
    """The script of each text of a large_string column, by its first LETTERS letters."""
    data, offsets = array_buffers(texts)
    found = np.empty(len(texts), np.int32)
    scripts.dominant(data, offsets, table(), LETTERS, found)
    return pa.DictionaryArray.from_arrays(found, pa.array(SCRIPTS))
