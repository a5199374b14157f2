"""Canonical composition (NFC) as the `tokenizers` library does it: its tables of Unicode, and texts brought into it."""

import functools

import numpy as np
from tokenizers import normalizers

from dataprep.pretokenizer import CODE_POINTS, known_characters, members
from kernels import nfc

HANGUL = range(0xAC00, 0xD7A4)
JAMO = (range(0x1161, 0x1176), range(0x11A8, 0x11C3))  # vowels and finals, which compose by rule


def compose(text: bytes) -> bytes:
    """UTF-8 in NFC."""
    return normalizers.NFC().normalize_str(text.decode()).encode()


def _each(normalizer: normalizers.Normalizer, texts: list[str]) -> list[str]:
    return normalizer.normalize_str("\n".join(texts)).split("\n")


@functools.cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """(kinds, pairs) for `kernels.nfc.may_change`, asked of the library, whose Unicode is older than Python's."""
    kinds = np.zeros(CODE_POINTS, np.uint8)
    pairs = []
    characters = [char for char in known_characters()[0] if char >= " " and ord(char) not in HANGUL]
    decomposed = {c: d for c, d in zip(characters, _each(normalizers.NFD(), characters), strict=True) if c != d}
    for char, composed in zip(decomposed, _each(normalizers.NFC(), list(decomposed)), strict=True):
        kinds[ord(char)] |= nfc.DECOMPOSES
        if composed != char:
            kinds[ord(char)] |= nfc.CHANGES
            continue
        first = normalizers.NFC().normalize_str(decomposed[char][:-1])
        second = ord(decomposed[char][-1])
        kinds[second] |= nfc.SECOND if len(first) == 1 else nfc.CHANGES
        pairs.append(ord(first[0]) << 32 | second)
    for jamo in JAMO:
        kinds[jamo] |= nfc.CHANGES
    marks = [chr(code) for code in np.flatnonzero(members(r"\p{M}")) if chr(code) not in decomposed]
    # A mark of class 1 goes before, one of class 240 behind every mark of another class.
    low, high = "\u0334", "\u0345"
    for mark, behind, before in zip(
        marks,
        _each(normalizers.NFD(), [mark + low for mark in marks]),
        _each(normalizers.NFD(), [high + mark for mark in marks]),
        strict=True,
    ):
        if behind != mark + low or before != high + mark:
            kinds[ord(mark)] |= nfc.MARK
    return kinds, np.array(sorted(pairs), np.uint64)


def may_change(data: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Indices of the texts data[bounds[k]:bounds[k+1]] that NFC might change."""
    found = np.empty(len(bounds) - 1, np.bool_)
    nfc.may_change(data, bounds, *tables(), found)
    return np.flatnonzero(found)
