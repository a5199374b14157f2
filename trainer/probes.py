"""What evaluation asks the model: held-out documents, needles in haystacks, keys with values, all as rows of tokens."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kernels.best_fit import best_fit
from mixer.reader import SEGMENT, Batch, ShardLog, StageInfo
from trainer.vocabulary import Vocabulary

CITIES = (
    "Lisbon", "Oslo", "Nairobi", "Quito", "Hanoi", "Cairo", "Lima", "Riga", "Accra", "Dhaka", "Sofia", "Tunis", "Osaka",
    "Perth", "Malmo", "Turin",
)  # fmt: skip
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
    pieces = []  # (place in the order, document, offset), tokens, segment
    for row in range(sequences):
        batch = log.read(row, row + 1)
        for s in batch.segments:
            document, tokens = (int(s["doc"]), int(s["copy"])), batch.tokens[0, s["start"] : s["start"] + s["length"]]
            pieces.append(((digest(document), document, int(s["offset"])), tokens.astype(np.int64), s))
    pieces.sort(key=lambda piece: piece[0])

    items: list[Item] = []
    there, expected = 0, ((-1, -1), 0)
    for (_, document, offset), tokens, s in pieces:
        follows = (document, offset) == expected
        if there >= limit and not follows:
            break
        there += len(tokens)
        expected = document, offset + len(tokens)
        run = np.concatenate([items.pop().tokens, tokens]) if follows else tokens
        about = {"source": log.stage.sources[s["source"]], "class": log.stage.classes[s["length_class"]]}
        items += [Item(run[i : i + context], about) for i in range(0, len(run), context)]
    return items


def haystacks(hay: np.ndarray, vocabulary: Vocabulary, context: int, samples: int) -> list[Item]:
    """Needles and keys at every length up to `context`, filled up with `hay`; those that do not fit are left out."""
    lengths = [n for n in (context >> 3, context >> 2, context >> 1, context) if n >= SHORTEST]
    items: list[Item | None] = []
    for length in lengths:
        for sample in range(samples):
            items += [needle(hay, vocabulary, length, depth, sample) for depth in DEPTHS]
            items.append(recall(vocabulary, length, sample))
    return [item for item in items if item is not None]


def needle(hay: np.ndarray, vocabulary: Vocabulary, length: int, depth: float, sample: int) -> Item | None:
    """A sentence at `depth` of unrelated text, and the beginning of it again at the end (arXiv 2501.08313, NIAH)."""
    number = digits("needle", length, depth, sample)
    asked = f"\nThe special magic {CITIES[int(number) % len(CITIES)]} number is:"
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
    pairs: list[tuple[str, str]] = []
    left = length
    while True:
        key, value = (digits(what, length, sample, len(pairs)) for what in ("key", "value"))
        line = vocabulary.encode(f"key {key}: {value}\n")
        left -= len(line)
        if left < len(line):  # the question needs the place
            break
        lines.append(line)
        pairs.append((key, value))
    if not pairs:
        return None
    key, value = pairs[int(digits("query", length, sample)) % len(pairs)]
    question, answer = vocabulary.encode(f"key {key}:"), vocabulary.encode(f" {value}")
    about = {"probe": "recall", "length": length, "pairs": len(pairs)}
    return Item(np.concatenate([*lines, question, answer])[-length:], about, len(answer))


def digits(*what: Any) -> str:
    """Six digits that hash what they are for."""
    return f"{digest(what) % 1_000_000:06d}"


def digest(what: tuple[Any, ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(what).encode()).digest()[:8], "little")
