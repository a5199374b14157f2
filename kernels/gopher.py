"""Gopher's quality and repetition signals of UTF-8 documents, all in one pass family over the bytes.

Definitions. *Characters* are code points, white space included wherever the whole text is meant. *Words* are what lies
between white space; a letter of a script written without spaces (Han, kana, Thai, ...) is, with its marks, a word of
its own, so that repetition means something there too. *Lines* end at LF, CR or CR LF; blank ones do not count, and a
line's characters run from its first to its last that is not white space. *Paragraphs* are runs of lines between blank
ones. Lines and paragraphs are equal if their words are. Every share is 0 for a document without words.

    characters                      of the whole text
    words                           that hold a letter, mark or number
    mean_word_length                of those words, in characters
    hash_ratio, ellipsis_ratio      `#`, and `...` or `…`, per word of any kind
    bullet_lines, ellipsis_lines    share of lines that start with a bullet, end with an ellipsis
    letter_words                    share of words that hold a letter
    stop_words                      how many of `the be to of and that have with` occur, in any case
    diversity                       log(distinct words) / log(words): hardly depends on the length
    unique_words                    distinct words / words
    duplicate_paragraphs, _lines    share of them that occurred before; `..._characters`: their share of all characters
    top_2gram .. top_4gram          occurrences x characters (single spaces between its words) of the most frequent
                                    n-gram, the longest of them in a tie, over all characters; 0 if none occurs twice
    duplicate_5gram .. _10gram      share of all characters in words of n-grams met before, going from left to right
                                    and on behind each one found, so that none counts twice

An n-gram can only occur twice where its first n - 1 words do. Each level therefore looks only at what the one before
found twice, under an exact key (class of the first n - 1 words, last word); only words and lines are told apart by a
64-bit hash.
"""

import functools
import unicodedata

import numpy as np

from kernels.jit import njit
from kernels.words import CODE_POINTS, SPACELESS, decode, mix

SIGNALS = (
    "characters", "words", "mean_word_length", "hash_ratio", "ellipsis_ratio", "bullet_lines", "ellipsis_lines",
    "letter_words", "stop_words", "diversity", "unique_words", "duplicate_paragraphs",
    "duplicate_paragraph_characters", "duplicate_lines", "duplicate_line_characters", "top_2gram", "top_3gram",
    "top_4gram", "duplicate_5gram", "duplicate_6gram", "duplicate_7gram", "duplicate_8gram", "duplicate_9gram",
    "duplicate_10gram",
)  # fmt: skip
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = "-*•‣◦⁃▪▫●○■□–·"

SPACE, LETTER, CONTENT, ALONE, MARK, BULLET, SYMBOL, OPEN = (np.uint8(1 << k) for k in range(8))

# What `_scan` counts; the first eight become the first eight signals.
_CHARACTERS, _WORDS, _WORD_CHARACTERS, _HASHES, _ELLIPSES, _BULLETS, _ELLIPSIS_LINES, _LETTER_WORDS, _STOPS = range(9)

_STOPS_PACKED = np.array([int.from_bytes(word.encode(), "big") for word in STOP_WORDS], np.uint32)
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_ONE = np.uint64(1)
_VISITED = np.uint64(1 << 63)
_COUNT = np.uint64((1 << 63) - 1)


def character_class(char: str) -> int:
    """The bits of one character: the definition that the table is made from."""
    category = unicodedata.category(char)
    bits = int(SPACE) if char.isspace() else 0
    bits |= int(LETTER) if category[0] == "L" else 0
    bits |= int(CONTENT) if category[0] in "LMN" else 0
    bits |= int(MARK) if category[0] == "M" else 0
    if category[0] in "LN" and unicodedata.name(char, "").startswith(SPACELESS):
        bits |= int(ALONE)
    bits |= int(BULLET) if char in BULLETS else 0
    return bits | (int(SYMBOL) if char in "#.…" else 0)


@functools.cache
def table() -> np.ndarray:
    """`character_class` as uint8[CODE_POINTS], made once per process."""
    return np.fromiter((character_class(chr(c)) for c in range(CODE_POINTS)), np.uint8, CODE_POINTS)


@njit
def _scan(data, start, end, classes, words, ends, lines, counts):
    """Split one document; returns (words, lines).

    Fills words (hashes), ends (characters in the words up to each, after a 0), lines (int32[:, 4]: first word, place of
    the first character and behind the last, 1 if a paragraph begins) and counts.
    """
    counts[:] = 0
    word_count = line_count = chars = dots = 0
    open_word = np.uint8(0)  # the classes of its characters and OPEN
    value = np.uint64(0)
    word_byte = word_char = line_end = 0
    in_line = bullet = ellipsis = False
    new_paragraph = True
    i = start
    while i <= end:
        code, size = np.uint32(10), 1  # behind the last byte, a line feed closes what is open
        if i < end:
            code = np.uint32(data[i])
            if code >= 0x80:
                code, size = decode(data, i, end)
        kind = classes[code] if code < CODE_POINTS else np.uint8(0)
        if open_word and (kind & (SPACE | ALONE) or (open_word & ALONE and not kind & MARK)):
            words[word_count] = mix(value)
            word_count += 1
            ends[word_count] = ends[word_count - 1] + chars - word_char
            if open_word & CONTENT:
                counts[_WORDS] += 1
                counts[_WORD_CHARACTERS] += chars - word_char
            if open_word & LETTER:
                counts[_LETTER_WORDS] += 1
                if i - word_byte <= 4:
                    counts[_STOPS] |= _stop_word(data, word_byte, i)
            open_word = np.uint8(0)
        if kind & SPACE:
            dots = 0
            if code == 10 or (code == 13 and (i + 1 >= end or data[i + 1] != 10)):
                if in_line:
                    lines[line_count, 2] = line_end
                    line_count += 1
                    counts[_BULLETS] += bullet
                    counts[_ELLIPSIS_LINES] += ellipsis
                new_paragraph = not in_line
                in_line = False
        else:
            if not open_word:
                value = np.uint64(0)
                word_byte, word_char = i, chars
                if not in_line:
                    in_line, bullet = True, (kind & BULLET) != 0
                    lines[line_count, 0] = word_count
                    lines[line_count, 1] = chars
                    lines[line_count, 3] = new_paragraph
            open_word |= kind | OPEN
            value = (value ^ np.uint64(code)) * _PRIME
            line_end = chars + 1
            if kind & SYMBOL:
                dots = dots + 1 if code == 46 else 0
                counts[_HASHES] += code == 35
                counts[_ELLIPSES] += code == 0x2026 or (dots > 0 and dots % 3 == 0)
                ellipsis = code == 0x2026 or dots >= 3
            else:
                dots, ellipsis = 0, False
        chars += 1
        i += size
    counts[_CHARACTERS] = chars - 1
    return word_count, line_count


@njit
def _stop_word(data, begin, end):
    """The bit of the stop word in data[begin:end], at most four bytes; 0 if it is none."""
    packed = np.uint32(0)
    for i in range(begin, end):
        packed = packed << np.uint32(8) | np.uint32(data[i] | 0x20)
    for k in range(len(_STOPS_PACKED)):
        if packed == _STOPS_PACKED[k]:
            return 1 << k
    return 0


@njit
def _cleared(slots, count):
    """An empty hash table for up to `count` keys: rows (key, occurrences), at most two thirds in use."""
    size = 16
    while 2 * size < 3 * count:
        size *= 2
    slots[:size] = 0
    return slots[:size]


@njit
def _slot(slots, key):
    """The row that holds the key, or the free one where it belongs."""
    mask = np.uint64(len(slots) - 1)
    slot = mix(key) & mask
    while slots[slot, 1] != 0 and slots[slot, 0] != key:
        slot = (slot + _ONE) & mask
    slots[slot, 0] = key
    return slot


@njit
def _duplicates(keys, sizes, count, slots):
    """(how many of keys[:count] occurred before, the sum of their sizes)."""
    slots = _cleared(slots, count)
    found = characters = 0
    for k in range(count):
        slot = _slot(slots, keys[k])
        if slots[slot, 1]:
            found += 1
            characters += sizes[k]
        slots[slot, 1] = _ONE
    return found, characters


@njit
def _blocks(words, word_count, lines, line_count, paragraphs, keys, sizes):
    """Keys and characters of the lines, or of the paragraphs; returns how many there are."""
    count = 0
    for k in range(line_count):
        if k == 0 or not paragraphs or lines[k, 3]:
            begin, key = lines[k, 1], np.uint64(0)
            count += 1
        for w in range(lines[k, 0], lines[k + 1, 0] if k + 1 < line_count else word_count):
            key = (key ^ words[w]) * _PRIME
            key ^= key >> np.uint64(32)
        keys[count - 1] = mix(key)
        sizes[count - 1] = lines[k, 2] - begin
    return count


@njit
def _word_classes(words, count, slots):
    """Replace hashes by the rows they got, numbers below 2^32; returns how many words are distinct."""
    slots = _cleared(slots, count)
    distinct = 0
    for i in range(count):
        slot = _slot(slots, words[i])
        distinct += slots[slot, 1] == 0
        slots[slot, 1] += _ONE
        words[i] = slot
    return distinct


@njit
def _ngrams(words, ends, count, slots, groups, active, found):
    """Characters of the most frequent 2- to 4-gram and in duplicate 5- to 10-grams, into found[0:9]."""
    found[:] = 0
    for i in range(count):  # groups: the class of the n - 1 words at each place; active: places where it may repeat
        groups[i] = words[i]
        active[i] = i
    for n in range(2, 11):
        while count and active[count - 1] + n > ends.size - 1:
            count -= 1
        table = _cleared(slots, count)
        most, free = _ONE, 0
        for k in range(count):
            i = active[k]
            slot = _slot(table, np.uint64(groups[i]) << np.uint64(32) | words[i + n - 1])
            groups[i] = slot
            table[slot, 1] += _ONE
            characters = np.int64(ends[i + n] - ends[i])
            if n <= 4:
                times = table[slot, 1]
                size = np.int64(times) * (characters + n - 1)
                if times > most or (times == most and times > _ONE and size > found[n - 2]):
                    most = times
                    found[n - 2] = size
            elif i >= free:
                if table[slot, 1] & _VISITED:
                    found[n - 2] += characters
                    free = i + n
                table[slot, 1] |= _VISITED
        kept = 0
        for k in range(count):
            if table[groups[active[k]], 1] & _COUNT > _ONE:
                active[kept] = active[k]
                kept += 1
        count = kept


@njit
def _signals(data, offsets, classes, out):
    longest = 0
    for d in range(len(offsets) - 1):
        longest = max(longest, offsets[d + 1] - offsets[d])
    # A word takes two bytes with its separator, as does a line; letters that stand alone take three. Memory that no
    # document needs is never touched.
    most = longest // 2 + 2
    words, ends = np.empty(most, np.uint64), np.zeros(most + 1, np.int32)
    lines = np.empty((most, 4), np.int32)
    keys, sizes = np.empty(most, np.uint64), np.empty(most, np.int32)
    groups, active = np.empty(most, np.uint32), np.empty(most, np.int32)
    slots = np.empty((16, 2), np.uint64)
    counts, found = np.empty(9, np.int64), np.empty(9, np.int64)
    for d in range(len(offsets) - 1):
        word_count, line_count = _scan(data, offsets[d], offsets[d + 1], classes, words, ends, lines, counts)
        out[d, :] = 0
        out[d, 0] = characters = counts[_CHARACTERS]
        if word_count == 0:
            continue
        size = len(slots)
        while 2 * size < 3 * word_count:
            size *= 2
        if size > len(slots):
            slots = np.empty((size, 2), np.uint64)
        out[d, 1] = counts[_WORDS]
        out[d, 2] = counts[_WORD_CHARACTERS] / max(1, counts[_WORDS])
        out[d, 3] = counts[_HASHES] / word_count
        out[d, 4] = counts[_ELLIPSES] / word_count
        out[d, 5] = counts[_BULLETS] / line_count
        out[d, 6] = counts[_ELLIPSIS_LINES] / line_count
        out[d, 7] = counts[_LETTER_WORDS] / word_count
        for k in range(len(_STOPS_PACKED)):
            out[d, 8] += counts[_STOPS] >> k & 1
        for paragraphs in (True, False):
            blocks = _blocks(words, word_count, lines, line_count, paragraphs, keys, sizes)
            repeated, repeated_characters = _duplicates(keys, sizes, blocks, slots)
            column = 11 if paragraphs else 13
            out[d, column] = repeated / blocks
            out[d, column + 1] = repeated_characters / characters
        distinct = _word_classes(words, word_count, slots)
        out[d, 9] = np.log(distinct) / np.log(word_count) if word_count > 1 else 1.0
        out[d, 10] = distinct / word_count
        _ngrams(words, ends[: word_count + 1], word_count, slots, groups, active, found)
        for k in range(9):
            out[d, 15 + k] = found[k] / characters


def signals(data: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """float32[documents, len(SIGNALS)] of the documents' UTF-8 bytes (uint8) cut at offsets (int64, one more).

    Time is linear in the bytes, whatever they say. Memory: about 40 bytes per word of the longest document, and its
    hash table (at most 48 more).
    """
    out = np.empty((len(offsets) - 1, len(SIGNALS)), np.float32)
    _signals(data, offsets, table(), out)
    return out
