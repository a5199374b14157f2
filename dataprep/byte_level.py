"""Byte-level BPE from a tokenizer.json as tables for `kernels.bpe`: the same ids as the `tokenizers` library's, faster.

Texts are cut at added tokens, brought into NFC where the file asks for it, cut again by the pre-tokeniser, and merged.
Special tokens' names in a text are text (`encode_special_tokens`).
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from tokenizers import AddedToken, pre_tokenizers

from dataprep import nfc
from dataprep.pretokenizer import Unsupported, compile_pre_tokenizer
from dataprep.storage import binary_array
from kernels import bpe, merges, scan

DYNAMIC_WORDS = 1 << 17  # cached at once beside the vocabulary, at most
POOL = 1 << 20


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary -> the byte. (GPT-2's table.)"""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {chr(byte): byte for byte in plain} | {chr(256 + k): byte for k, byte in enumerate(others)}
    if sorted(table) != sorted(pre_tokenizers.ByteLevel.alphabet()):
        raise Unsupported("the library has another alphabet of bytes")
    return table


class Segments(NamedTuple):
    """Parts of texts, in order: data[bounds[k]:bounds[k+1]] belongs to text number texts[k].

    tokens[k]: the added token that it is, or -1. data: uint8; the others int64.
    """

    data: np.ndarray
    bounds: np.ndarray
    texts: np.ndarray
    tokens: np.ndarray

    def rewritten(self, rows: np.ndarray, change: Callable[[bytes], bytes]) -> "Segments":
        """The segments with `change` applied to some."""
        parts, lengths, done = [], np.diff(self.bounds), self.bounds[0]
        for row in rows:
            start, end = self.bounds[row : row + 2]
            changed = change(self.data[start:end].tobytes())
            parts += [self.data[done:start], np.frombuffer(changed, np.uint8)]
            lengths[row], done = len(changed), end
        data = np.concatenate([*parts, self.data[done : self.bounds[-1]]])
        return self._replace(data=data, bounds=np.concatenate([[0], np.cumsum(lengths)]))


class AddedTokens:
    """Finds added tokens in texts: the leftmost, the longest of those. Special ones stay text."""

    def __init__(self, tokens: dict[int, AddedToken], change: Callable[[bytes], bytes]):
        plain = {change(t.content.encode()): (number, t) for number, t in tokens.items() if not t.special}
        for _, token in plain.values():
            if flags := [flag for flag in ("single_word", "lstrip", "rstrip") if getattr(token, flag)]:
                raise Unsupported(f"its added token {token.content!r} has the option {flags[0]}")
        self.ids = {name: number for name, (number, _) in plain.items()}
        # A special token takes the text it covers away from others, although it is then read as text.
        names = {change(t.content.encode()) for t in tokens.values() if t.content}
        self.pattern = re.compile(b"|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if plain else None

    def split(self, segments: Segments) -> Segments:
        """The segments, cut so that every added token in them is one of its own."""
        found = list(self._find(segments))
        if not found:
            return segments
        spans = np.array([span for span, _ in found], np.int64)
        bounds = np.unique(np.concatenate([segments.bounds, spans.ravel()]))
        rows = np.searchsorted(segments.bounds, bounds[:-1], "right") - 1
        tokens = segments.tokens[rows]
        tokens[np.searchsorted(bounds, spans[:, 0])] = [token for _, token in found]
        return Segments(segments.data, bounds, segments.texts[rows], tokens)

    def _find(self, segments: Segments) -> Iterator[tuple[tuple[int, int], int]]:
        """((start, end), id) of the added tokens in segments that are none."""
        data, bounds = segments.data.data, segments.bounds
        at, end = int(bounds[0]), int(bounds[-1])
        while self.pattern and (match := self.pattern.search(data, at, end)):
            row = np.searchsorted(bounds, match.start(), "right") - 1
            limit = int(bounds[row + 1])
            if segments.tokens[row] >= 0:
                at = limit
                continue
            if match.end() > limit:  # over the end of its text: is there a shorter one within?
                match = self.pattern.search(data, match.start(), limit)
            at = match.end() if match else limit
            if match and match.group() in self.ids:
                yield match.span(), self.ids[match.group()]


class ByteLevelBPE:
    """A byte-level BPE tokeniser, for one thread at a time. Unsupported, with the reason, for any other tokeniser."""

    def __init__(self, description: dict[str, Any], added: dict[int, AddedToken]):
        """description: the tokenizer.json. added: the added tokens as the library numbers them."""
        model = description["model"]
        self._check(model)
        self._scanners = scan.as_arrays(compile_pre_tokenizer(description["pre_tokenizer"]))
        self._nfc = uses_nfc(description["normalizer"])
        self._raw = AddedTokens({k: t for k, t in added.items() if not t.normalized}, lambda name: name)
        change = nfc.compose if self._nfc else lambda name: name
        self._normalized = AddedTokens({k: t for k, t in added.items() if t.normalized}, change)
        alphabet = byte_alphabet()
        vocabulary: dict[str, int] = model["vocab"]
        if missing := [char for char in alphabet if char not in vocabulary]:
            raise Unsupported(f"its vocabulary lacks {len(missing)} of the 256 bytes")
        byte_ids = np.zeros(256, np.uint32)
        byte_ids[list(alphabet.values())] = [vocabulary[char] for char in alphabet]
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        if max(vocabulary.values()) >> merges.ID_BITS or len(pairs) >= merges.NO_RANK:
            raise Unsupported("its vocabulary is too large")
        ranked = np.array([(vocabulary[a], vocabulary[b]) for a, b in pairs], np.uint32).reshape(-1, 2)
        merged = np.array([vocabulary[a + b] for a, b in pairs], np.uint32)
        self._merges = merges.make(ranked, merged, byte_ids)
        self._seeded = self._seed(vocabulary, alphabet, bool(model.get("ignore_merges")))
        self._cache = bpe.Cache(*(array.copy() for array in self._seeded))

    @staticmethod
    def _check(model: dict[str, Any]) -> None:
        if model["type"] != "BPE":
            raise Unsupported(f"its model is {model['type']}, not BPE")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(name):
                raise Unsupported(f"its model has a {name}")

    def _seed(self, vocabulary: dict[str, int], alphabet: dict[str, int], verbatim: bool) -> bpe.Cache:
        table = {ord(char): byte for char, byte in alphabet.items()}
        words, ids = [], []
        for token, number in vocabulary.items():
            word = token.translate(table)
            if token and all(map(alphabet.__contains__, token)):
                words.append(word.encode("latin-1"))
                ids.append(number)
        offsets = np.cumsum([0, *map(len, words)])
        data = np.frombuffer(b"".join(words), np.uint8)
        slots = 1 << ((len(words) + DYNAMIC_WORDS) * 3 // 2 - 1).bit_length()
        cache = bpe.empty_cache(slots, len(words) + POOL, len(data) + 16 * POOL)
        bpe.seed(data, offsets, np.array(ids, np.uint32), self._merges, verbatim, cache)
        return cache

    def forget(self) -> None:
        """Go back to the cache as it was at first."""
        for ours, first in zip(self._cache, self._seeded, strict=True):
            ours[:] = first

    def encode(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids uint32, offsets int64) of texts data[offsets[k]:offsets[k+1]] (uint8, int64).

        What is not UTF-8 in a text is read as U+FFFD, as Python does.
        """
        texts = len(offsets) - 1
        segments = Segments(data, offsets, np.arange(texts), np.full(texts, -1))
        if not is_utf8(data, offsets):
            segments = segments.rewritten(np.arange(texts), lambda text: text.decode(errors="replace").encode())
        segments = self._raw.split(segments)
        if self._nfc:
            rows = nfc.may_change(read_only(segments.data), read_only(segments.bounds))
            segments = segments.rewritten(rows[segments.tokens[rows] < 0], nfc.compose) if len(rows) else segments
        segments = self._normalized.split(segments)
        # The kernels are compiled for each type of their arguments, and what one may not write is a type of its own.
        data, bounds = read_only(segments.data), read_only(segments.bounds)
        out = np.empty(bounds[-1] - bounds[0] + 3, np.uint32)
        counts = np.empty(len(bounds) - 1, np.int64)
        tables = self._scanners, self._merges, self._cache, self._seeded
        total = bpe.encode(data, bounds, segments.tokens, *tables, out, counts)
        ends = np.concatenate([[0], np.cumsum(counts)])
        return out[:total], ends[np.searchsorted(segments.texts, np.arange(texts + 1))]


def read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


def is_utf8(data: np.ndarray, offsets: np.ndarray) -> bool:
    """Whether all texts are valid UTF-8."""
    try:
        binary_array(data, offsets).view(pa.large_string()).validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def uses_nfc(normalizer: dict[str, Any] | None) -> bool:
    """Whether a tokenizer.json's `normalizer` is NFC, or nothing."""
    description = normalizer or {"type": "Sequence", "normalizers": []}
    kinds = {part["type"] for part in description.get("normalizers", [description])}
    if kinds - {"NFC"}:
        raise Unsupported(f"its normaliser is {', '.join(sorted(kinds))}")
    return bool(kinds)
