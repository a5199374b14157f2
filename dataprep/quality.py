"""Quality: signals of every document, the rules it fails, a score in 0..1 and a tier. Nothing is removed here.

A *rule* is the interval that its signal must lie in; it bears the signal's name (kernels/gopher.py defines them all). A
*rule set* is a list of rules; each source has its own sets, because rules made for English web pages fail code, other
languages and long books for no good reason.

The *score* is the mean over the signals in SCORE of how far the document lies on the way from worst (0) to best (1): is
there enough text, is it made of words, with a rich vocabulary, and how much of it repeats itself. It asks nothing that
only English prose can give, so sources without rules have all tiers too. The *tier* is `low` if a rule fails or the
score is under `low`, `high` from the score `high` on, else `medium`.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dataprep.storage import array_buffers
from kernels.gopher import SIGNALS, signals
from kernels.words import mix

TIERS = ("low", "medium", "high")
Interval = tuple[float | None, float | None]

GOPHER_QUALITY: dict[str, Interval] = {
    "words": (50, None),  # published with a limit of 100,000, but books are what a long-context curriculum lives on
    "mean_word_length": (3, 10),
    "hash_ratio": (None, 0.1),
    "ellipsis_ratio": (None, 0.1),
    "bullet_lines": (None, 0.9),
    "ellipsis_lines": (None, 0.3),
    "letter_words": (0.8, None),
    "stop_words": (2, None),
}
GOPHER_REPETITION: dict[str, Interval] = {
    "duplicate_paragraphs": (None, 0.3),
    "duplicate_paragraph_characters": (None, 0.2),
    "duplicate_lines": (None, 0.3),
    "duplicate_line_characters": (None, 0.2),
    "top_2gram": (None, 0.2),
    "top_3gram": (None, 0.18),
    "top_4gram": (None, 0.16),
    "duplicate_5gram": (None, 0.15),
    "duplicate_6gram": (None, 0.14),
    "duplicate_7gram": (None, 0.13),
    "duplicate_8gram": (None, 0.12),
    "duplicate_9gram": (None, 0.11),
    "duplicate_10gram": (None, 0.1),
}
RULES = GOPHER_QUALITY | GOPHER_REPETITION
RULE_SETS = {
    "gopher": tuple(RULES),
    "gopher_quality": tuple(GOPHER_QUALITY),  # English prose
    "gopher_repetition": tuple(GOPHER_REPETITION),  # prose in any language
}

# Signal -> (worst, best).
SCORE = {
    "words": (0.0, 200.0),
    "letter_words": (0.4, 0.9),
    "diversity": (0.6, 0.85),
    "duplicate_line_characters": (0.4, 0.0),
    "duplicate_5gram": (0.4, 0.0),
}
BINS = 20
EXAMPLES = 3


class QualityConfig(BaseModel):
    """Which rules each source must meet, and what score makes a tier."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: tuple[str, ...] = Field(
        default=("gopher",),
        description="rule sets of the sources that by_source does not name: " + ", ".join(RULE_SETS),
    )
    by_source: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="source -> its rule sets; [] = no rules, right for code"
    )
    thresholds: dict[str, Interval] = Field(
        default_factory=dict, description="rule -> [min, max] in place of the published ones; null = no limit"
    )
    low: float = Field(default=0.7, ge=0, le=1, description="a document with a score under this is low")
    high: float = Field(default=0.9, ge=0, le=1, description="a document that fails no rule is high from this score on")

    @model_validator(mode="after")
    def _check(self) -> "QualityConfig":
        for key, names in {"rules": self.rules, **{f"by_source.{s}": n for s, n in self.by_source.items()}}.items():
            for name in names:
                if name not in RULE_SETS:
                    raise ValueError(f"{key} names the rule set {name!r}; there are {', '.join(RULE_SETS)}")
        for rule, (low, high) in self.thresholds.items():
            if rule not in RULES:
                raise ValueError(f"thresholds names the rule {rule!r}; there are {', '.join(RULES)}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"thresholds.{rule} is [{low}, {high}]: no value can meet it; put the smaller first")
        if self.low > self.high:
            raise ValueError(f"low is {self.low} and high is {self.high}: low must not be above high")
        return self

    def rules_of(self, source: str) -> set[str]:
        """The rules that the documents of a source must meet."""
        return {rule for name in self.by_source.get(source, self.rules) for rule in RULE_SETS[name]}


def score(documents: pa.Table, config: QualityConfig) -> pa.Table:
    """The `quality` table of documents(doc, source, text): a row for each, in the same order.

    Columns: doc; one float32 per signal; failed list<dictionary string>, in the order of RULES; score float32; tier
    dictionary string.
    """
    matrix = signals(*array_buffers(documents["text"]))
    failing = _failing(matrix, documents, config)
    points = _score(matrix)
    tier = np.where(points >= np.float32(config.high), 2, 1)
    tier[failing.any(axis=1) | (points < np.float32(config.low))] = 0

    counts = np.concatenate([[0], np.cumsum(failing.sum(axis=1))])
    failed = pa.ListArray.from_arrays(pa.array(counts, pa.int32()), _dictionary(np.nonzero(failing)[1], tuple(RULES)))
    columns = {"doc": documents["doc"]}
    columns |= {name: pa.array(np.ascontiguousarray(matrix[:, k])) for k, name in enumerate(SIGNALS)}
    return pa.table(columns | {"failed": failed, "score": pa.array(points), "tier": _dictionary(tier, TIERS)})


def _failing(matrix: np.ndarray, documents: pa.Table, config: QualityConfig) -> np.ndarray:
    """bool[documents, rules]: which rules of its source a document fails."""
    codes, names = _sources(documents)
    failing = np.zeros((len(matrix), len(RULES)), bool)
    for column, (rule, interval) in enumerate((RULES | config.thresholds).items()):
        low, high = (math.inf * sign if limit is None else limit for limit, sign in zip(interval, (-1, 1), strict=True))
        values = matrix[:, SIGNALS.index(rule)]
        outside = (values < np.float32(low)) | (values > np.float32(high))
        failing[:, column] = outside & np.array([rule in config.rules_of(name) for name in names], bool)[codes]
    return failing


def _score(matrix: np.ndarray) -> np.ndarray:
    parts = [
        np.clip((matrix[:, SIGNALS.index(name)] - np.float32(worst)) / np.float32(best - worst), 0, 1)
        for name, (worst, best) in SCORE.items()
    ]
    return np.stack(parts).mean(axis=0, dtype=np.float32)


def aggregates(table: pa.Table, documents: pa.Table) -> dict[str, Any]:
    """What the report reads instead of documents. table: as from `score`; documents: its doc, source, text.

    `documents`: source -> count. `tiers`: source -> tier -> count. `failed`: source -> rule -> count. `scores`: source
    -> counts in BINS equal bins. `examples`: source -> tier -> up to EXAMPLES of {doc, rank, score, excerpt}, those
    with the smallest hash of doc (`rank`), so that several partitions' examples can be merged.
    """
    codes, names = _sources(documents)
    tier = table["tier"].combine_chunks().indices.to_numpy()
    bins = np.minimum((table["score"].to_numpy() * BINS).astype(np.int64), BINS - 1)
    failed = table["failed"].combine_chunks()
    rules = np.asarray(pc.list_flatten(failed).indices, np.int64)
    rule_codes = codes[np.asarray(pc.list_parent_indices(failed), np.int64)]
    examples = _examples(table, documents, codes * len(TIERS) + tier)
    result: dict[str, Any] = {"documents": {}, "tiers": {}, "failed": {}, "scores": {}, "examples": {}}
    for code, name in enumerate(names):
        here = codes == code
        if not here.any():
            continue
        result["documents"][name] = int(here.sum())
        result["tiers"][name] = _counts(tier[here], TIERS)
        result["failed"][name] = _counts(rules[rule_codes == code], tuple(RULES))
        result["scores"][name] = np.bincount(bins[here], minlength=BINS).tolist()
        result["examples"][name] = {
            t: found for k, t in enumerate(TIERS) if (found := examples.get(code * len(TIERS) + k))
        }
    return result


def _examples(table: pa.Table, documents: pa.Table, group: np.ndarray) -> dict[int, list[dict[str, Any]]]:
    rank = mix(documents["doc"].to_numpy())
    order = np.lexsort((rank, group))
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    chosen = order[place < EXAMPLES]
    excerpts = pc.utf8_slice_codeunits(documents["text"].take(pa.array(chosen)), 0, 200)
    result: dict[int, list[dict[str, Any]]] = {}
    for row, excerpt in zip(chosen.tolist(), excerpts.to_pylist(), strict=True):
        points = round(table["score"][row].as_py(), 4)
        example = {"doc": documents["doc"][row].as_py(), "rank": int(rank[row]), "score": points, "excerpt": excerpt}
        result.setdefault(int(group[row]), []).append(example)
    return result


def _counts(codes: np.ndarray, names: tuple[str, ...]) -> dict[str, int]:
    return {name: count for name, count in zip(names, np.bincount(codes).tolist(), strict=False) if count}


def _sources(documents: pa.Table) -> tuple[np.ndarray, list[str]]:
    """(codes int64, the names they stand for) of the documents' sources."""
    column = documents["source"].cast(pa.string()).combine_chunks().dictionary_encode()
    return np.asarray(column.indices, np.int64), column.dictionary.to_pylist()


def _dictionary(codes: np.ndarray, names: tuple[str, ...]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names, pa.string()))
