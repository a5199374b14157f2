"""The language a document is written in, by CLD2 (its model ships inside `pycld2`).

A document over SAMPLE bytes is judged by PIECES pieces of equal size, the first at its start, the last at its end, the
others evenly between: that bounds the work, and a licence at the top does not decide. docs/quality.md says why CLD2.
"""

import functools

import numpy as np
import pyarrow as pa
import pycld2

from dataprep.storage import array_buffers

SAMPLE, PIECES = 4096, 4  # bytes
LEAST = 32  # bytes of letters; less is too little to tell
UNKNOWN = "und"
_CODES = {"iw": "he", "jw": "jv", "in": "id", "mo": "ro", "un": UNKNOWN}  # CLD2's older codes


def identify(text: pa.ChunkedArray) -> tuple[pa.DictionaryArray, np.ndarray]:
    """(language, score) of every document.

    language: dictionary string, ISO 639-1, 639-3 where a language has no two letters, `und` where none is found.
    score: float32, the share of the sampled letters that are in it, 0 for `und`.
    """
    data, offsets = array_buffers(text)
    languages: list[str] = []
    scores = np.zeros(len(offsets) - 1, np.float32)
    for d, (start, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        language, scores[d] = detect(sample(data, start, end))
        languages.append(language)
    return pa.array(languages, pa.string()).dictionary_encode(), scores


def sample(data: np.ndarray, start: int, end: int) -> str:
    """What of data[start:end] (UTF-8) is judged; characters that the cuts go through are left out."""
    if end - start <= SAMPLE:
        return data[start:end].tobytes().decode("utf-8", "ignore")
    size = SAMPLE // PIECES
    begins = [start + (end - start - size) * k // (PIECES - 1) for k in range(PIECES)]
    return "\n".join(data[b : b + size].tobytes().decode("utf-8", "ignore") for b in begins)


@functools.cache
def codes() -> frozenset[str]:
    """All that `detect` can answer."""
    found = {_CODES.get(code, code.split("-")[0]) for _, code in pycld2.LANGUAGES}
    return frozenset({code for code in found if not code.startswith("xx")} | {UNKNOWN})


def detect(text: str) -> tuple[str, float]:
    """(language, share of the text in it) of a short text."""
    try:
        found = pycld2.detect(text, isPlainText=True, bestEffort=True)
    except pycld2.error:  # a control character or one that Unicode forbids to exchange
        found = pycld2.detect("".join(c if c.isprintable() else " " for c in text), isPlainText=True, bestEffort=True)
    _, size, ((_, code, percent, _), *_) = found
    language = _CODES.get(code, code.split("-")[0])
    if size < LEAST or language == UNKNOWN or language.startswith("xx"):  # xx: a script alone
        return UNKNOWN, 0.0
    return language, percent / 100
