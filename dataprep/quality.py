"""Quality: what is measured of every document, the rules it fails, a score in 0..1 and a tier. Nothing is removed.

Two steps. `measure` reads the text, which takes its time; `judge` reads what was measured, so that rules and tiers can
be tried out in seconds. Tiers by quantile need the scores of the whole corpus in between.

The *score* is the mean over the signals in SCORE of how far the document lies on the way from worst (0) to best (1): is
there enough text, is it made of words, with a rich vocabulary, and how much of it repeats itself. It asks nothing that
only English prose can give, so sources without rules have all tiers too. A classifier's head can take its place. The
*tier* is `low` if a rule fails or the score is too low, `high` if it is high enough, else `medium`.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep import decontaminate
from dataprep.language import identify
from dataprep.rules import RULES, TIERS, QualityConfig
from dataprep.signals import SIGNALS, signals
from dataprep.storage import UserError

# Signal -> (worst, best).
SCORE = {
    "words": (0.0, 200.0),
    "letter_words": (0.4, 0.9),
    "diversity": (0.6, 0.85),
    "duplicate_line_characters": (0.4, 0.0),
    "duplicate_5gram": (0.4, 0.0),
}
BINS = 1024  # of the score, of equal width; a score of 1 has one more of its own
Histograms = dict[str, dict[str, dict[str, int]]]  # source -> language -> bin (a string, as in JSON) -> documents
Cuts = dict[str, dict[str, list[float]]]  # source -> language -> [score from which it is medium, from which high]


def measure(documents: pa.Table, config: QualityConfig) -> pa.Table:
    """The `signals` table of documents(doc, source, text): a row for each, in the same order.

    Columns: doc; each of SIGNALS float32; language dictionary string, language_score float32; a column per head of the
    classifier; evaluation dictionary string, overlap float32, overlap_ngrams uint32; score float32.
    """
    text = documents["text"]
    columns: dict[str, Any] = {"doc": documents["doc"]}
    measured = signals(text)
    columns |= {name: pa.array(values) for name, values in measured.items()}
    columns["language"], columns["language_score"] = identify(text)
    points = _score(measured)
    if config.classifier:
        from dataprep.classifier import Classifier  # it is not needed where no model is configured

        heads = Classifier.load(config.classifier).score(text)
        columns |= {name: heads[name] for name in heads.column_names}
        if config.score != "signals":
            points = _head(heads, config)
    columns |= decontaminate.load(config.decontaminate.model_dump_json()).overlaps(text)
    return pa.table(columns | {"score": pa.array(points)})


def _score(measured: dict[str, np.ndarray]) -> np.ndarray:
    parts = [
        np.clip((measured[name] - np.float32(worst)) / np.float32(best - worst), 0, 1)
        for name, (worst, best) in SCORE.items()
    ]
    return np.stack(parts).mean(axis=0, dtype=np.float32)


def _head(heads: pa.Table, config: QualityConfig) -> np.ndarray:
    numbers = [field.name for field in heads.schema if pa.types.is_floating(field.type)]
    if config.score not in numbers:
        known = ", ".join(["signals", *numbers])
        raise UserError(f"quality.score = {config.score!r}: {config.classifier} has no such head; there are {known}")
    return np.clip(np.nan_to_num(heads[config.score].to_numpy()), 0, 1).astype(np.float32)


def histograms(measured: pa.Table, documents: pa.Table) -> Histograms:
    """How often each score occurs, by source and language. measured: from `measure`, of these documents."""
    bins = np.floor(measured["score"].to_numpy() * np.float32(BINS)).astype(np.int64)
    return counts(documents["source"], measured["language"], pa.array(bins))


def cuts(scores: Histograms, config: QualityConfig) -> Cuts:
    """Where the tiers begin for every source and language.

    By quantile it is the edge of a bin, the one that comes nearest to the share asked for.
    """
    result: Cuts = {}
    for source, languages in sorted(scores.items()):
        for language, bins in sorted(languages.items()):
            tier = config.tier_of(source, language)
            limits = [tier.low, tier.high]
            if tier.by == "quantile":
                counts = np.zeros(BINS + 1, np.int64)
                counts[[int(b) for b in bins]] = list(bins.values())
                below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
                limits = [int(np.abs(below - share).argmin()) / BINS for share in limits]
            result.setdefault(source, {})[language] = limits
    return result


def judge(documents: pa.Table, measured: pa.Table, config: QualityConfig, limits: Cuts) -> pa.Table:
    """The `quality` table of documents(doc, source): a row for each, in the same order. limits: from `cuts`.

    Columns: doc; language and score as measured; failed list<dictionary string>, in the order of RULES; tier dictionary
    string; contaminated bool.
    """
    group, names = groups(documents["source"], measured["language"])
    failing = _failing(measured, group, names, config)
    points = measured["score"].to_numpy()
    lows, highs = np.array([limits[s][l] for s, l in names], np.float32).reshape(-1, 2).T
    tier = np.where(points >= highs[group], 2, 1)
    tier[failing.any(axis=1) | (points < lows[group])] = 0
    counts = np.concatenate([[0], np.cumsum(failing.sum(axis=1))])
    failed = pa.ListArray.from_arrays(pa.array(counts, pa.int32()), _dictionary(np.nonzero(failing)[1], tuple(RULES)))
    overlap = measured["overlap"].to_numpy()
    return pa.table(
        {
            "doc": documents["doc"],
            "language": measured["language"],
            "score": measured["score"],
            "failed": failed,
            "tier": _dictionary(tier, TIERS),
            "contaminated": pa.array(overlap >= np.float32(config.decontaminate.threshold)),
        }
    )


def _failing(measured: pa.Table, group: np.ndarray, names: list[tuple[str, ...]], config: QualityConfig) -> np.ndarray:
    """bool[documents, rules]: which rules of its source and language a document fails."""
    judges = [config.judges(*name) for name in names]
    failing = np.zeros((len(measured), len(RULES)), bool)
    for column, (rule, interval) in enumerate((RULES | config.thresholds).items()):
        rule_set, signal = rule.split(".")
        low, high = (math.inf * sign if limit is None else limit for limit, sign in zip(interval, (-1, 1), strict=True))
        values = measured[signal].to_numpy()
        outside = (values < np.float32(low)) | (values > np.float32(high))
        failing[:, column] = outside & np.array([rule_set in sets for sets in judges], bool)[group]
    return failing


def groups(*columns: pa.ChunkedArray) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """(codes int64, the strings they stand for) of the rows of some string columns, dictionaries or not."""
    joined = pc.binary_join_element_wise(*(column.cast(pa.string()) for column in columns), "\0")
    coded = joined.combine_chunks().dictionary_encode()
    names = [tuple(pair.split("\0")) for pair in coded.dictionary.to_pylist()]
    return np.asarray(coded.indices, np.int64), names


def counts(*columns: pa.ChunkedArray | pa.Array) -> dict[str, Any]:
    """How many rows have each combination of values of some columns; nested in their order, keys as strings."""
    names = [str(k) for k in range(len(columns))]
    table = pa.table([column.cast(pa.string()) for column in columns], names)
    result: dict[str, Any] = {}
    for row in table.group_by(names).aggregate([([], "count_all")]).to_pylist():
        inner = result
        for name in names[:-1]:
            inner = inner.setdefault(row[name], {})
        inner[row[names[-1]]] = row["count_all"]
    return result


def _dictionary(codes: np.ndarray, names: tuple[str, ...]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names, pa.string()))


assert {rule.split(".")[1] for rule in RULES} | set(SCORE) <= set(SIGNALS)
