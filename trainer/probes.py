"""What evaluation asks the model: held-out documents, needles in haystacks, keys with values, all as rows of tokens."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernels.best_fit import best_fit
from mixer.reader import SEGMENT, Batch, ShardLog, StageInfo
from trainer.vocabulary import Vocabulary

CITIES = [
    "Lisbon",
    "Oslo",
    "Nairobi",
    "Quito",
    "Hanoi",
    "Cairo",
    "Lima",
    "Riga",
    "Accra",
    "Dhaka",
    "Sofia",
    "Tunis",
    "Osaka",
    "Perth",
    "Malmo",
    "Turin",
]
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHORTEST = 64  # tokens of the shortest haystack


@dataclass(frozen=True)
class Item:
    """A document to evaluate; of a probe, the last `answer` tokens are what is asked for."""

    tokens: np.ndarray
    about: dict[str, Any] = field(default_factory=dict)
    answer: int = 0


class Rows:
    """Items packed into sequences of `context`, read as a shard log is. A segment's `doc` is its item's number."""

    def __init__(self, items: list[Item], context: int, stage: StageInfo):
        self.stage = stage
        lengths = np.array([len(item.tokens) for item in items], np.int64)
        bins = best_fit(lengths, context)
        self.tokens = np.full((int(bins.max(initial=-1)) + 1, context), stage.eos, np.int64)
        self.segments = np.zeros(len(items), SEGMENT)
        used = np.zeros(len(self.tokens), np.int64)
        for i, number in enumerate(np.argsort(bins, kind="stable")):
            row, length = bins[number], lengths[number]
            self.tokens[row, used[row] : used[row] + length] = items[number].tokens
            self.segments[i] = (row, used[row], length, number, 0, 0, 0, 0, 0)
            used[row] += length

    def read_ahead(self, slices: object) -> None:
        """As a shard log has it; here everything is there."""

    def read(self, start: int, stop: int) -> Batch:
        low, high = np.searchsorted(self.segments["sequence"], [start, stop])
        segments = self.segments[low:high].copy()
        segments["sequence"] -= start
        return Batch(self.tokens[start:stop], segments)


def held_out(log: ShardLog, sequences: int, limit: int, context: int) -> list[Item]:
    """Documents of `sequences` held-out sequences in the order of a hash: `limit` tokens or a little more.

    A document's pieces are put together again, so that the held-out context does not bound what is measured, and cut
    to `context`.
    """
    pieces: dict[tuple[int, int], list[tuple[int, np.ndarray, Any]]] = {}
    for first in range(0, sequences, step := max(1, (1 << 20) // log.stage.context)):
        batch = log.read(first, min(sequences, first + step))
        for s in batch.segments:
            tokens = batch.tokens[s["sequence"], s["start"] : s["start"] + s["length"]].astype(np.int64)
            pieces.setdefault((int(s["doc"]), int(s["copy"])), []).append((int(s["offset"]), tokens, s))
    items: list[Item] = []
    there = 0
    for _, found in sorted(pieces.items(), key=lambda entry: digest(entry[0])):
        if there >= limit:
            break
        found.sort(key=lambda piece: piece[0])
        runs: list[list[np.ndarray]] = []
        expected = None
        for offset, tokens, _ in found:
            if offset != expected:
                runs.append([])
            runs[-1].append(tokens)
            expected = offset + len(tokens)
        s = found[0][2]
        about = {"source": log.stage.sources[s["source"]], "class": log.stage.classes[s["length_class"]]}
        for run in map(np.concatenate, runs):
            items += [Item(run[i : i + context], about) for i in range(0, len(run), context)]
            there += len(run)
    return items


def haystacks(hay: np.ndarray, vocabulary: Vocabulary, context: int, samples: int) -> list[Item]:
    """Needles and keys at every length up to `context`, filled up with `hay`."""
    lengths = [n for n in (context >> 3, context >> 2, context >> 1, context) if n >= SHORTEST]
    items = []
    for length in lengths:
        for sample in range(samples):
            items += [needle(hay, vocabulary, length, depth, sample) for depth in DEPTHS]
            items.append(recall(vocabulary, length, sample))
    return [item for item in items if item is not None]


def needle(hay: np.ndarray, vocabulary: Vocabulary, length: int, depth: float, sample: int) -> Item | None:
    """A sentence at `depth` of unrelated text, and the beginning of it again at the end (arXiv 2501.08313, NIAH)."""
    number = digits("needle", length, depth, sample)
    city = CITIES[int(number) % len(CITIES)]
    asked = f"\nThe special magic {city} number is:"
    sentence, question, answer = map(vocabulary.encode, (f"{asked} {number}.\n", asked, f" {number}"))
    room = length - len(sentence) - len(question) - len(answer)
    if room < 1:
        return None
    filler = np.resize(np.roll(hay, -(int(number) % max(1, len(hay)))), room)
    before = round(depth * room)
    tokens = np.concatenate([filler[:before], sentence, filler[before:], question, answer])
    return Item(tokens, {"probe": "needle", "length": length, "depth": depth}, len(answer))


def recall(vocabulary: Vocabulary, length: int, sample: int) -> Item | None:
    """Lines of a key and its value, as many as fit, and one of the keys again at the end."""
    lines: list[np.ndarray] = []
    keys: list[tuple[str, str]] = []
    used = 0
    while True:
        key, value = digits("key", length, sample, len(keys)), digits("value", length, sample, len(keys))
        line = vocabulary.encode(f"key {key}: {value}\n")
        if used + 2 * len(line) > length:
            break
        lines.append(line)
        keys.append((key, value))
        used += len(line)
    if not keys:
        return None
    key, value = keys[int(digits("query", length, sample)) % len(keys)]
    question, answer = vocabulary.encode(f"key {key}:"), vocabulary.encode(f" {value}")
    about = {"probe": "recall", "length": length, "pairs": len(keys)}
    return Item(np.concatenate([*lines, question, answer])[-length:], about, len(answer))


def digits(*what: Any) -> str:
    """Six digits that hash what they are for."""
    return f"{digest(what) % 1_000_000:06d}"


def digest(what: tuple[Any, ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little")
