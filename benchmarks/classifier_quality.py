"""The quality classifier on labelled text, and its speed: `python -m benchmarks.classifier_quality --corpus DIR`."""

import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
import zstandard
from rich.console import Console
from rich.table import Table

from benchmarks.dedup_corpus import about, parser, save, sources
from dataprep import metrics
from dataprep.classifier import Classifier, ClassifierConfig
from dataprep.storage import UserError
from dataprep.train_classifier import Row, train

FOLDS = 5
CONFIG = ClassifierConfig()
WEB, LEVELS = "multi_hplt_quality_labelled", "en_onestop_parallel_levels"
GRADES = {"ele": 0.0, "int": 0.5, "adv": 1.0}
PER_SOURCE = 100  # documents whose source is to be told

Scores = np.ndarray
Learn = Callable[[list[Row]], Callable[[list[Row]], Scores]]


def documents(file: Path) -> Iterator[dict]:
    with open(file, "rb") as raw:
        for line in io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(raw), "utf-8"):
            yield json.loads(line)


def labels(corpus: str, name: str) -> dict[str, dict[str, str]]:
    with open(Path(corpus) / "labels" / name, newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file, delimiter="\t")}


def web_rows(corpus: str, file: Path) -> list[Row]:
    """Web text that people judged: bad is what at least half of them called pornographic, unnatural or in another
    language than it was said to be."""
    judged = labels(corpus, f"{WEB}.tsv")
    rows = []
    for document in documents(file):
        if found := judged.get(document["id"]):
            bad = max(float(found["porn"]), float(found["unnatural"])) >= 0.5 or float(found["lang_correct"]) < 0.5
            rows.append(Row(document["text"].encode(), {"quality": float(not bad)}, {"language": found["lang"]}, ""))
    return rows


def level_rows(corpus: str, file: Path) -> list[Row]:
    """Articles at three reading levels, all of one article on the same side of every split."""
    level = labels(corpus, f"{LEVELS}.clusters.tsv")
    return [
        Row(d["text"].encode(), {"knowledge": GRADES[found["level"]]}, {"source": found["level"]}, found["cluster"])
        for d in documents(file)
        if (found := level.get(d["id"]))
    ]


def source_rows(files: dict[str, Path], count: int) -> list[Row]:
    """The first documents of every source, whose name is their domain."""
    rows = []
    for name, file in files.items():
        for number, document in enumerate(documents(file)):
            if number == count:
                break
            text = document["text"][: CONFIG.characters].encode("utf-8", "replace")
            rows.append(Row(text, {"domain": name}, {"source": name}, ""))
    return rows


def texts(rows: list[Row]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([row.text.decode() for row in rows], pa.large_string())])


def ours(head: str) -> Learn:
    def learn(rows: list[Row]) -> Callable[[list[Row]], Scores]:
        model = train(rows, CONFIG)
        return lambda others: np.array(model.score(texts(others))[head].to_pylist())

    return learn


def peer(head: str) -> Learn | None:
    """Logistic regression on the same kind of features, where scikit-learn is installed."""
    try:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None
    vectors = HashingVectorizer(n_features=1 << 20, ngram_range=(1, 2), alternate_sign=False)

    def learn(rows: list[Row]) -> Callable[[list[Row]], Scores]:
        features = vectors.transform([row.text.decode() for row in rows])
        model = LogisticRegression(C=10, max_iter=300).fit(features, [row.labels[head] >= 0.5 for row in rows])
        return lambda others: model.predict_proba(vectors.transform([row.text.decode() for row in others]))[:, 1]

    return learn


def out_of_fold(rows: list[Row], learn: Learn) -> Scores:
    """The score of each row by a model that saw neither it nor others of its unit."""
    fold = np.array([xxhash.xxh3_64_intdigest(row.unit.encode() or row.text, 1) % FOLDS for row in rows])
    found: dict[int, float | str] = {}
    for k in range(FOLDS):
        score = learn([row for row, f in zip(rows, fold, strict=True) if f != k])
        here = np.flatnonzero(fold == k).tolist()
        found |= dict(zip(here, score([rows[n] for n in here]).tolist(), strict=True))
    return np.array([found[n] for n in range(len(rows))])


def show(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def web_section(corpus: str, file: Path, console: Console) -> dict[str, float]:
    rows = web_rows(corpus, file)
    labels = np.array([row.labels["quality"] for row in rows])
    language = np.array([row.groups["language"] for row in rows])
    scores = {"ours": out_of_fold(rows, ours("quality"))}
    if learn := peer("quality"):
        scores["peer"] = out_of_fold(rows, learn)
    table = Table(title=f"good or bad: {WEB}, {FOLDS} folds, every row scored by a model that did not see it")
    for name in ("language", "rows", "bad", "AUC", "Spearman", "ECE", "AUC of logistic regression"):
        table.add_column(name, justify="left" if name == "language" else "right")
    within: dict[str, list[tuple[float, int]]] = {name: [] for name in scores}
    for name in [*sorted(set(language)), "all"]:
        here = language == name if name != "all" else np.full(len(rows), True)
        bad = int((labels[here] < 0.5).sum())
        found = metrics.agreement(scores["ours"][here], labels[here])
        aucs = {who: metrics.auc(s[here], labels[here] >= 0.5) for who, s in scores.items()}
        for who, value in aucs.items():
            if value is not None and name != "all":
                within[who].append((value, bad))
        row = [name, f"{len(labels[here]):,}", f"{bad:,}", show(aucs["ours"]), show(found["spearman"])]
        table.add_row(*row, show(found["ece"]), show(aucs.get("peer")))
    console.print(table)
    mean = {
        who: float(np.average([v for v, _ in pairs], weights=[n for _, n in pairs])) for who, pairs in within.items()
    }
    console.print(
        f"mean AUC within a language, weighted by bad rows: {', '.join(f'{w} {v:.3f}' for w, v in mean.items())}"
    )
    figures = {"classifier_auc": metrics.auc(scores["ours"], labels >= 0.5), "classifier_auc_within": mean["ours"]}
    figures["classifier_ece"] = metrics.calibration_error(scores["ours"], labels)
    if "peer" in scores:
        figures["classifier_auc_peer"] = metrics.auc(scores["peer"], labels >= 0.5)
        figures["classifier_auc_within_peer"] = mean["peer"]
    return {name: value for name, value in figures.items() if value is not None}


def level_section(corpus: str, file: Path, console: Console) -> dict[str, float]:
    rows = level_rows(corpus, file)
    grades = np.array([row.labels["knowledge"] for row in rows])
    scores = out_of_fold(rows, ours("knowledge"))
    units = np.array([row.unit for row in rows])
    pairs = [
        scores[(units == u) & (grades == 1)].mean() > scores[(units == u) & (grades == 0)].mean()
        for u in sorted(set(units))
        if {0.0, 1.0} <= set(grades[units == u])
    ]
    rho, ordered = metrics.spearman(scores, grades), float(np.mean(pairs))
    console.print(
        f"graded labels: {LEVELS}, {len(rows)} texts, {FOLDS} folds by article: Spearman {show(rho)}, "
        f"ECE {metrics.calibration_error(scores, grades):.3f}; advanced above elementary in {ordered:.1%} of "
        f"{len(pairs)} articles"
    )
    return {"classifier_spearman_levels": rho or 0.0, "classifier_levels_ordered": ordered}


def source_section(files: dict[str, Path], count: int, console: Console) -> dict[str, float]:
    rows = source_rows(files, count)
    wanted = np.array([row.labels["domain"] for row in rows])
    right = out_of_fold(rows, ours("domain")) == wanted
    worst = sorted((float(right[wanted == name].mean()), name) for name in files)[:3]
    console.print(
        f"domain: which of {len(files)} sources, {len(rows):,} documents, {FOLDS} folds: {right.mean():.1%} right; "
        "worst " + ", ".join(f"{name} {share:.0%}" for share, name in worst)
    )
    return {"classifier_domain_accuracy": float(right.mean())}


def speed_section(files: dict[str, Path], megabytes: float, console: Console) -> dict[str, float]:
    """Text to scores, CPU time of one thread, for a model with one head and a domain for each source."""
    rows = source_rows(files, 20)
    for number, row in enumerate(rows):
        row.labels["quality"] = float(number % 2)
    model = train(rows, CONFIG)
    seconds = size = 0.0
    slowest = (float("inf"), "")
    for name, file in files.items():
        chosen: list[str] = []
        taken = 0
        for document in documents(file):
            chosen.append(document["text"].encode("utf-8", "replace").decode())
            taken += len(chosen[-1].encode())
            if taken > megabytes * 1e6:
                break
        text = pa.chunked_array([pa.array(chosen, pa.large_string())])
        best = min(_timed(model, text) for _ in range(3))
        seconds, size, slowest = seconds + best, size + taken, min(slowest, (taken / 1e6 / best, name))
    speed = size / 1e6 / seconds
    console.print(
        f"speed: {size / 1e6:,.0f} MB of {len(files)} sources, {len(model.bias)} outputs, {CONFIG.buckets:,} buckets: "
        f"{speed:,.0f} MB/s on one core; slowest {slowest[1]}, {slowest[0]:,.0f} MB/s"
    )
    return {"classifier_mb_s_core": speed}


def _timed(model: Classifier, text: pa.ChunkedArray) -> float:
    start = time.thread_time()
    model.score(text)
    return time.thread_time() - start


def classifier_section(corpus: str, quick: bool = False) -> dict[str, float]:
    """Print how well and how fast the classifier does on a directory of corpora; the figures by name."""
    files = sources(corpus)
    console = Console(width=120, highlight=False)
    figures: dict[str, float] = {}
    for name, section in ((WEB, web_section), (LEVELS, level_section)):
        if name in files:
            figures |= section(corpus, files[name], console)
        else:
            console.print(f"{name}: not there, skipped")
    if len(files) > 1:
        figures |= source_section(files, 40 if quick else PER_SOURCE, console)
    return figures | speed_section(files, 2 if quick else 10, console)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    if not arguments.corpus:
        raise UserError("--corpus is missing: a directory of .jsonl.zst files, their labels in labels/")
    print(f"trains some 25 small models and scores all sources: about a minute; {about()}", file=sys.stderr)
    save(arguments.json, classifier_section(arguments.corpus, arguments.quick))


if __name__ == "__main__":
    main()
