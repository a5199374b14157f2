"""The quality classifier on labelled text, and its speed, for `benchmarks/quality.py`."""

import csv
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from benchmarks.common import column, documents, installed, sources, speeds, table
from dataprep import metrics
from dataprep.classifier import ClassifierConfig
from dataprep.train_classifier import Row, train

FOLDS = 5
CONFIG = ClassifierConfig()
WEB, LEVELS = "multi_hplt_quality_labelled", "en_onestop_parallel_levels"
GRADES = {"ele": 0.0, "int": 0.5, "adv": 1.0}

Learn = Callable[[list[Row], list[Row], str], np.ndarray]  # known and asked rows, the head: scores of those asked


def labels(path: Path) -> dict[str, dict[str, str]]:
    with open(path, newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file, delimiter="\t")}


def web_rows(corpus: Path) -> list[Row]:
    """Web text that people judged: bad is what at least half of them called pornographic, unnatural or in another
    language than it was said to be."""
    judged, rows = labels(corpus / f"labels/{WEB}.tsv"), []
    for name, text in documents(corpus / f"{WEB}.jsonl.zst"):
        if found := judged.get(name):
            bad = max(float(found["porn"]), float(found["unnatural"])) >= 0.5 or float(found["lang_correct"]) < 0.5
            rows.append(Row(text.encode(), {"quality": float(not bad)}, {"language": found["lang"]}, ""))
    return rows


def level_rows(corpus: Path) -> list[Row]:
    """Articles at three reading levels, all of one article on the same side of every split."""
    level = labels(corpus / f"labels/{LEVELS}.clusters.tsv")
    return [
        Row(text.encode(), {"knowledge": GRADES[found["level"]]}, {"language": "eng_Latn"}, found["cluster"])
        for name, text in documents(corpus / f"{LEVELS}.jsonl.zst")
        if (found := level.get(name))
    ]


def texts(rows: list[Row]) -> list[str]:
    return [row.text.decode() for row in rows]


def ours(known: list[Row], asked: list[Row], head: str) -> np.ndarray:
    return np.array(train(known, CONFIG).score(column(texts(asked)))[head].to_pylist())


def logistic_regression(known: list[Row], asked: list[Row], head: str) -> np.ndarray:
    """On the same kind of features."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = HashingVectorizer(n_features=1 << 20, ngram_range=(1, 2), alternate_sign=False)
    model = LogisticRegression(C=10, max_iter=300)
    model.fit(vectors.transform(texts(known)), [row.labels[head] >= 0.5 for row in known])
    return model.predict_proba(vectors.transform(texts(asked)))[:, 1]


def out_of_fold(rows: list[Row], learn: Learn, head: str) -> np.ndarray:
    """The score of each row by a model that saw neither it nor others of its unit."""
    fold = np.array([xxhash.xxh3_64_intdigest(row.unit.encode() or row.text, 1) % FOLDS for row in rows])
    scores = np.empty(len(rows))
    for k in range(FOLDS):
        known, asked = ([row for row, f in zip(rows, fold, strict=True) if (f == k) == held] for held in (False, True))
        scores[fold == k] = learn(known, asked, head)
    return scores


def agreement(title: str, rows: list[Row], head: str, peer: bool) -> dict[str, Any]:
    """Print by language, and return of all, how well scores agree with labels, ours and perhaps the peer's."""
    wanted = np.array([row.labels[head] for row in rows])
    language = np.array([row.groups["language"] for row in rows])
    scores = out_of_fold(rows, ours, head)
    theirs = out_of_fold(rows, logistic_regression, head) if peer else None
    found, lines = {}, []
    for name in [*sorted(set(language)), "all"]:
        here = (language == name) | (name == "all")
        found = metrics.agreement(scores[here], wanted[here])
        found["peer"] = None if theirs is None else metrics.auc(theirs[here], wanted[here] >= 0.5)
        shown = ("" if found[key] is None else f"{found[key]:.3f}" for key in ("auc", "spearman", "ece", "peer"))
        lines.append((name, f"{here.sum():,}", f"{(wanted[here] < 0.5).sum():,}", *shown))
    columns = ("language", "rows", "bad", "AUC", "Spearman", "ECE", "AUC of logistic regression")
    table(f"{title}, {FOLDS} folds, every row scored by a model that did not see it", columns, lines)
    return found


def speed(files: dict[str, Path], megabytes: float) -> float:
    """MB/s from text to scores, for a model with one head and a domain for each source."""
    rows = [
        Row(text[: CONFIG.characters].encode(), {"domain": name, "quality": float(number % 2)}, {}, "")
        for name, file in files.items()
        for number, (_, text) in enumerate(islice(documents(file), 20))
    ]
    model = train(rows, CONFIG)
    read = {name: column(text for _, text in documents(file, megabytes)) for name, file in files.items()}
    return speeds(f"scores: {len(model.bias)} outputs, {CONFIG.buckets:,} buckets", read, model.score, 3)[0]


def classifier_section(corpus: Path, quick: bool) -> dict[str, float]:
    """Print how well and how fast the classifier does on a directory of corpora; the figures by name."""
    files, peer = sources(str(corpus)), installed("sklearn") and not quick
    figures = {"classifier_mb_s_core": speed(files, 2 if quick else 10)}
    if WEB in files:
        web = agreement("good or bad web text", web_rows(corpus), "quality", peer)
        figures |= {"classifier_auc": web["auc"], "classifier_ece": web["ece"]}
        figures |= {"classifier_auc_peer": web["peer"]} if web["peer"] else {}
    if LEVELS in files:
        levels = agreement("articles at three reading levels", level_rows(corpus), "knowledge", peer)
        figures["classifier_spearman_levels"] = levels["spearman"]
    return figures
