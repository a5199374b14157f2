"""Signals of a document's lines, sentences and scripts, after C4 and FineWeb: one pass over the bytes.

Words, lines and characters are as in `kernels.gopher`. Every share is 0 where there is nothing to take it of.

    sentences          ends of sentences: a mark (`.!?…` and their like in other scripts), any closing quotes or
                       brackets behind it, then white space or the end; `。！？` end one whatever follows
    terminal_lines     share of lines that end in such a mark, with what closes behind it, or in a quote
    short_lines        share of lines of at most 30 characters
    newline_ratio      line ends per word
    curly_brackets     how many `{` and `}`
    lorem_ipsum        how often it is said, in any case
    javascript_lines   share of lines that say `javascript`, in any case
    policy_lines       share of lines with one of POLICIES, in any case
    longest_word       in characters
    c4_lines           share of lines that C4 keeps: they end in a mark or a quote but not in an ellipsis, have at
                       least five words, none over 1,000 characters, no `javascript` and none of POLICIES
    c4_sentences       ends of sentences in those lines
    script_*           share of the letters that belong to the script

Sources: Raffel et al., JMLR 2020, section 2.2 (C4); Penedo et al., arXiv 2406.17557, section 3.6 (FineWeb).
"""

import functools
import unicodedata

import numpy as np

from kernels.jit import njit
from kernels.words import CODE_POINTS, SPACELESS, decode

POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
SHORT_LINE, LEAST_WORDS, LONGEST_WORD = 30, 5, 1000

SCRIPTS = {
    "latin": ("LATIN", "FULLWIDTH LATIN"),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "han": ("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH", "IDEOGRAPHIC"),
    "kana": ("HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA"),
    "hangul": ("HANGUL", "HALFWIDTH HANGUL"),
    "thai": ("THAI",),
    "other": ("",),
}
SIGNALS = (
    "sentences", "terminal_lines", "short_lines", "newline_ratio", "curly_brackets", "lorem_ipsum", "javascript_lines",
    "policy_lines", "longest_word", "c4_lines", "c4_sentences", *(f"script_{name}" for name in SCRIPTS),
)  # fmt: skip

STOPS = ".!?…‽⁇⁈⁉‼⸮؟۔।॥։።፧፨၊။។៕៖៚᠃᠉܀܁܂߹᙮꓿꘎꛳꛷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗"
WIDE_STOPS = "。！？｡．"
QUOTES = "\"'”’»›」』＂＇"
BRACKETS = ")]}）］】〉》"

# The bits of a character's class; its script, if it is a letter, is above them.
SPACE, ALONE, MARK, STOP, WIDE, QUOTE, CLOSING, WATCH = (np.uint16(1 << k) for k in range(8))
_OPEN = np.uint16(1 << 15)

# What is counted; all but the last two become signals, some of them as shares of those two.
(
    _SENTENCES, _TERMINAL, _SHORT, _NEWLINES, _BRACKETS, _LOREMS, _JAVASCRIPT_LINES, _POLICY_LINES, _LONGEST, _KEPT,
    _KEPT_SENTENCES, _WORDS, _LINES,
) = range(13)  # fmt: skip
_SHARES = np.zeros(_WORDS, np.int64)
_SHARES[[_TERMINAL, _SHORT, _JAVASCRIPT_LINES, _POLICY_LINES, _KEPT]] = _LINES
_SHARES[_NEWLINES] = _WORDS

_PHRASES = [(1, "javascript"), *((2, p) for p in POLICIES), (4, "lorem ipsum")]
_JAVASCRIPT, _POLICY, _LOREM = 1, 2, 4
_BITS = np.array([bit for bit, _ in _PHRASES], np.uint8)
_TEXT = np.frombuffer("".join(p for _, p in _PHRASES).encode(), np.uint8)
_FROM = np.cumsum([0, *(len(p) for _, p in _PHRASES)])


def character_class(char: str) -> int:
    """The bits of one character and, from bit 8 on, its script if it is a letter: what the table is made from."""
    category, name = unicodedata.category(char), unicodedata.name(char, "")
    bits = int(SPACE) if char.isspace() else 0
    bits |= int(ALONE) if category[0] in "LN" and name.startswith(SPACELESS) else 0
    bits |= int(MARK) if category[0] == "M" else 0
    for flag, chars in ((STOP, STOPS + WIDE_STOPS), (WIDE, WIDE_STOPS), (QUOTE, QUOTES), (CLOSING, QUOTES + BRACKETS)):
        bits |= int(flag) if char in chars else 0
    bits |= int(WATCH) if char.lower() in {p[0] for _, p in _PHRASES} else 0
    if category[0] == "L":
        bits |= (1 + next(k for k, names in enumerate(SCRIPTS.values()) if name.startswith(names))) << 8
    return bits


@functools.cache
def table() -> np.ndarray:
    """`character_class` as uint16[CODE_POINTS], made once per process."""
    return np.fromiter((character_class(chr(c)) for c in range(CODE_POINTS)), np.uint16, CODE_POINTS)


@njit
def _phrase(data, i, end):
    """The bit of the phrase that begins at data[i], 0 if none does."""
    for p in range(len(_BITS)):
        first, size = _FROM[p], _FROM[p + 1] - _FROM[p]
        if i + size <= end:
            k = 0
            while k < size:
                wanted = _TEXT[first + k]
                if (data[i + k] | np.uint8(0x20) if wanted != 0x20 else data[i + k]) != wanted:
                    break
                k += 1
            if k == size:
                return _BITS[p]
    return np.uint8(0)


@njit
def _close_line(counts, size, words, longest, sentences, said, ended, dots):
    """Add a line to the counts."""
    counts[_LINES] += 1
    counts[_SENTENCES] += sentences
    counts[_TERMINAL] += ended
    counts[_SHORT] += size <= SHORT_LINE
    counts[_JAVASCRIPT_LINES] += said & _JAVASCRIPT != 0
    counts[_POLICY_LINES] += said & _POLICY != 0
    counts[_LONGEST] = max(counts[_LONGEST], longest)
    well = ended and dots < 3 and not said & (_JAVASCRIPT | _POLICY)
    if well and words >= LEAST_WORDS and longest <= LONGEST_WORD:
        counts[_KEPT] += 1
        counts[_KEPT_SENTENCES] += sentences


@njit
def _document(data, start, end, classes, counts, letters):
    """Fill counts and letters (by script, from 1 on) of one document."""
    counts[:] = 0
    letters[:] = 0
    in_line = ended = False  # ended: the line would end well here
    line_start = line_end = words = longest = sentences = dots = chars = word_start = 0
    said, open_word = np.uint8(0), np.uint16(0)  # phrases of the line; class of the open word's first character
    ending = 0  # behind a mark that may end a sentence: 1, or 2 if it does whatever follows
    i = start
    while i <= end:
        code, size = np.uint32(10), 1  # behind the last byte, a line feed closes what is open
        if i < end:
            code = np.uint32(data[i])
            if code >= 0x80:
                code, size = decode(data, i, end)
        kind = classes[code] if code < CODE_POINTS else np.uint16(0)
        letters[kind >> np.uint16(8)] += 1
        if open_word and (kind & (SPACE | ALONE) or (open_word & ALONE and not kind & MARK)):
            counts[_WORDS] += 1
            words += 1
            longest = max(longest, chars - word_start)
            open_word = np.uint16(0)
        if ending and not kind & (STOP | CLOSING):
            sentences += ending == 2 or kind & SPACE != 0
            ending = 0
        if kind & SPACE:
            if code == 10 or (code == 13 and (i + 1 >= end or data[i + 1] != 10)):
                counts[_NEWLINES] += i < end
                if in_line:
                    _close_line(counts, line_end - line_start, words, longest, sentences, said, ended, dots)
                in_line = False
        else:
            if not in_line:
                in_line, line_start, said = True, chars, np.uint8(0)
                words = longest = sentences = dots = 0
            if not open_word:
                open_word, word_start = kind | _OPEN, chars
            if kind & STOP:
                ending = 2 if kind & WIDE or ending == 2 else 1
            if kind & WATCH:
                bit = _phrase(data, i, end)
                said |= bit
                counts[_LOREMS] += bit == _LOREM
            counts[_BRACKETS] += (code == 123) | (code == 125)
            ended = ending != 0 or kind & QUOTE != 0
            dots = dots + 1 if code == 46 else (3 if code == 0x2026 else 0)
            line_end = chars + 1
        chars += 1
        i += size


@njit
def _signals(data, offsets, classes, shares, scripts, out):
    counts, letters = np.empty(_LINES + 1, np.int64), np.empty(scripts + 1, np.int64)
    for d in range(len(offsets) - 1):
        _document(data, offsets[d], offsets[d + 1], classes, counts, letters)
        for k in range(_WORDS):
            whole = counts[shares[k]] if shares[k] else 1
            out[d, k] = counts[k] / whole if whole else 0
        total = max(1, letters[1:].sum())
        for k in range(scripts):
            out[d, _WORDS + k] = letters[1 + k] / total


def signals(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """float32[documents, len(SIGNALS)] of the documents' UTF-8 bytes (uint8) cut at offsets (int64, one more)."""
    out = np.empty((len(offsets) - 1, len(SIGNALS)), np.float32)
    _signals(data, offsets, table(), _SHARES, len(SCRIPTS), out)
    return out
