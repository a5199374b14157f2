"""Words of UTF-8 text as 64-bit hashes: one table-driven pass over the bytes of all documents.

A *folding* is a table over code points that says what each does to a word. Both foldings cut the same words and
lower-case them; letters of scripts written without spaces (Han, kana, Thai, ...) are words of their own.

    candidate     casts a wide net: digits are alike, accents and other combining marks are dropped
    verification  what a person would call the same word: digits and marks count

Words are runs of letters, digits and `_` with their marks; marks never begin a word and invisible format characters
are passed over. Everything else separates.
"""

import functools
import unicodedata
from collections.abc import Iterator
from typing import Literal

import numpy as np

from kernels.jit import njit

Folding = Literal["candidate", "verification"]

# A table entry is `kind << 24 | folded code point`.
SEPARATOR, LETTER, ALONE, MARK, SKIP = range(5)
CODE_POINTS = 0x40000  # beyond lie only private use, tags and variation selectors: separators
ZERO_WIDTH_SPACE = "\u200b"  # a format character by category, a separator by purpose

SPACELESS = (
    "CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA",
    "BOPOMOFO", "YI SYLLABLE", "TANGUT", "NUSHU", "THAI", "LAO", "KHMER", "MYANMAR", "TAI", "NEW TAI", "JAVANESE",
    "BALINESE", "CHAM",
)  # fmt: skip

_START = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX2 = np.uint64(0xC4CEB9FE1A85EC53)
_S33 = np.uint64(33)


def fold(char: str, folding: Folding) -> tuple[int, str]:
    """(kind, folded character) of one character: the definition that the tables are made from."""
    category = unicodedata.category(char)
    if category[0] == "M":
        dropped = folding == "candidate" and category != "Mc"
        return (SKIP if dropped else MARK), char
    if category == "Cf" and char != ZERO_WIDTH_SPACE:
        return SKIP, char
    if category[0] not in "LN" and char != "_":
        return SEPARATOR, char
    kind = ALONE if unicodedata.name(char, "").startswith(SPACELESS) else LETTER
    if folding == "candidate":
        if category == "Nd":
            return kind, "0"
        base = [c for c in unicodedata.normalize("NFD", char) if unicodedata.category(c) != "Mn"]
        char = base[0] if len(base) == 1 else char  # a Hangul syllable is more than its first consonant
    return kind, char.lower()[0]


@functools.cache
def table(folding: Folding) -> np.ndarray:
    """The folding as uint32[CODE_POINTS], made once per process in about half a second."""
    entries = (fold(chr(c), folding) for c in range(CODE_POINTS))
    return np.fromiter((kind << 24 | ord(char) for kind, char in entries), np.uint32, CODE_POINTS)


def reference_words(text: str, folding: Folding) -> Iterator[str]:
    """The words that `word_hashes` finds, as strings."""
    word, alone = "", False
    for char in text:
        kind, folded = fold(char, folding) if ord(char) < CODE_POINTS else (SEPARATOR, "")
        if word and (kind in (SEPARATOR, ALONE) or (kind == LETTER and alone)):
            yield word
            word = ""
        if kind in (LETTER, ALONE) or (kind == MARK and word):
            word += folded
            alone = kind == ALONE or (kind == MARK and alone)
    if word:
        yield word


def reference_hash(word: str) -> int:
    """The 64-bit hash of a folded word."""
    value = int(_START)
    for char in word:
        value = (value ^ ord(char)) * int(_PRIME) % 2**64
    for multiplier in (_MIX1, _MIX2):
        value = (value ^ value >> 33) * int(multiplier) % 2**64
    return value ^ value >> 33


@njit
def mix(value):
    """A bijection of 64 bits in which every input bit reaches every output bit (MurmurHash3's finaliser)."""
    value = (value ^ (value >> _S33)) * _MIX1
    value = (value ^ (value >> _S33)) * _MIX2
    return value ^ (value >> _S33)


@njit
def decode(data, i, end):
    """(code point, bytes) of the UTF-8 character at data[i]; a broken one counts as one byte and U+FFFD."""
    lead = np.uint32(data[i])
    if lead < 0x80:
        return lead, 1
    size = 2 if lead < 0xE0 else (3 if lead < 0xF0 else 4)
    if lead < 0xC0 or i + size > end:
        return np.uint32(0xFFFD), 1
    code = lead & np.uint32(0xFF >> (size + 1))
    for k in range(1, size):
        if data[i + k] & 0xC0 != 0x80:
            return np.uint32(0xFFFD), 1
        code = (code << np.uint32(6)) | np.uint32(data[i + k] & 0x3F)
    return code, size


@njit
def _scan(data, offsets, folds, hashes, word_offsets):
    """Fill `hashes` and `word_offsets`; returns the number of words."""
    count = 0
    for d in range(len(offsets) - 1):
        word_offsets[d] = count
        i, end = offsets[d], offsets[d + 1]
        value = _START
        state = SEPARATOR  # no word is open; else the kind of the character that the open word began with
        while i < end:
            entry = folds[data[i]]
            size = 1
            if data[i] >= 0x80:
                code, size = decode(data, i, end)
                entry = folds[code] if code < CODE_POINTS else np.uint32(0)
            i += size
            kind = entry >> np.uint32(24)
            folded = np.uint64(entry & np.uint32(0xFFFFFF))
            if kind == LETTER and state != ALONE:
                value = (value ^ folded) * _PRIME
                state = LETTER
            elif kind <= ALONE:
                if state != SEPARATOR:
                    hashes[count] = mix(value)
                    count += 1
                value = _START if kind == SEPARATOR else (_START ^ folded) * _PRIME
                state = kind
            elif kind == MARK and state != SEPARATOR:
                value = (value ^ folded) * _PRIME
        if state != SEPARATOR:
            hashes[count] = mix(value)
            count += 1
    word_offsets[len(offsets) - 1] = count
    return count


def word_hashes(data: np.ndarray, offsets: np.ndarray, folding: Folding) -> tuple[np.ndarray, np.ndarray]:
    """The word hashes of all documents, in order, and where each document's begin.

    data: UTF-8 bytes (uint8); offsets: int64, one more than documents. Returns (hashes uint64, offsets int64).
    """
    documents = len(offsets) - 1
    # A word takes two bytes with its separator; letters that stand alone take three.
    most = int(offsets[-1] - offsets[0] + documents) // 2 + 1
    hashes = np.empty(most, np.uint64)
    word_offsets = np.empty(documents + 1, np.int64)
    count = _scan(data, offsets, table(folding), hashes, word_offsets)
    return hashes[:count], word_offsets
