"""The quality classifier on labelled text, and its speed: `python -m benchmarks.classifier_quality --corpus DIR`."""

import csv
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash

from benchmarks.common import about, column, documents, parser, report, sources, speeds, table
from dataprep import metrics
from dataprep.classifier import ClassifierConfig
from dataprep.train_classifier import Row, train

FOLDS = 5
CONFIG = ClassifierConfig()
WEB, LEVELS = "multi_hplt_quality_labelled", "en_onestop_parallel_levels"
GRADES = {"ele": 0.0, "int": 0.5, "adv": 1.0}
PER_SOURCE = 100  # documents whose source is to be told

Scores = np.ndarray
Learn = Callable[[list[Row]], Callable[[list[Row]], Scores]]


def labels(corpus: str, name: str) -> dict[str, dict[str, str]]:
    with open(Path(corpus) / "labels" / name, newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file, delimiter="\t")}


def web_rows(corpus: str, file: Path) -> list[Row]:
    """Web text that people judged: bad is what at least half of them called pornographic, unnatural or in another
    language than it was said to be."""
    judged, rows = labels(corpus, f"{WEB}.tsv"), []
    for name, text in documents(file):
        if found := judged.get(name):
            bad = max(float(found["porn"]), float(found["unnatural"])) >= 0.5 or float(found["lang_correct"]) < 0.5
            rows.append(Row(text.encode(), {"quality": float(not bad)}, {"language": found["lang"]}, ""))
    return rows


def level_rows(corpus: str, file: Path) -> list[Row]:
    """Articles at three reading levels, all of one article on the same side of every split."""
    level = labels(corpus, f"{LEVELS}.clusters.tsv")
    return [
        Row(text.encode(), {"knowledge": GRADES[found["level"]]}, {"source": found["level"]}, found["cluster"])
        for name, text in documents(file)
        if (found := level.get(name))
    ]


def source_rows(files: dict[str, Path], count: int) -> list[Row]:
    """The first documents of every source, whose name is their domain."""
    return [
        Row(text[: CONFIG.characters].encode(), {"domain": name}, {"source": name}, "")
        for name, file in files.items()
        for _, text in islice(documents(file), count)
    ]


def texts(rows: list[Row]) -> list[str]:
    return [row.text.decode() for row in rows]


def ours(head: str) -> Learn:
    def learn(rows: list[Row]) -> Callable[[list[Row]], Scores]:
        model = train(rows, CONFIG)
        return lambda others: np.array(model.score(column(texts(others)))[head].to_pylist())

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
        features = vectors.transform(texts(rows))
        model = LogisticRegression(C=10, max_iter=300).fit(features, [row.labels[head] >= 0.5 for row in rows])
        return lambda others: model.predict_proba(vectors.transform(texts(others)))[:, 1]

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


def web_section(corpus: str, file: Path) -> dict[str, float]:
    rows = web_rows(corpus, file)
    good = np.array([row.labels["quality"] for row in rows])
    language = np.array([row.groups["language"] for row in rows])
    learners = {"ours": ours("quality"), "peer": peer("quality")}
    scores = {who: out_of_fold(rows, learn) for who, learn in learners.items() if learn}
    within: dict[str, list[tuple[float, int]]] = {who: [] for who in scores}
    lines = []
    for name in [*sorted(set(language)), "all"]:
        here = language == name if name != "all" else np.full(len(rows), True)
        bad = int((good[here] < 0.5).sum())
        found = metrics.agreement(scores["ours"][here], good[here])
        aucs = {who: metrics.auc(s[here], good[here] >= 0.5) for who, s in scores.items()}
        for who, value in aucs.items():
            if value is not None and name != "all":
                within[who].append((value, bad))
        shown = (aucs["ours"], found["spearman"], found["ece"], aucs.get("peer"))
        lines.append((name, f"{here.sum():,}", f"{bad:,}", *map(show, shown)))
    title = f"good or bad: {WEB}, {FOLDS} folds, every row scored by a model that did not see it"
    table(title, ("language", "rows", "bad", "AUC", "Spearman", "ECE", "AUC of logistic regression"), lines)
    figures: dict[str, float | None] = {"classifier_ece": metrics.calibration_error(scores["ours"], good)}
    for who, end in (("ours", ""), ("peer", "_peer")):
        if who in scores:
            figures[f"classifier_auc{end}"] = metrics.auc(scores[who], good >= 0.5)
            aucs, bads = zip(*within[who], strict=True)
            figures[f"classifier_auc_within{end}"] = float(np.average(aucs, weights=bads))  # by bad rows
    return {name: value for name, value in figures.items() if value is not None}


def level_section(corpus: str, file: Path) -> dict[str, float]:
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
    print(
        f"graded labels: {LEVELS}, {len(rows)} texts, {FOLDS} folds by article: Spearman {show(rho)}, "
        f"ECE {metrics.calibration_error(scores, grades):.3f}; advanced above elementary in {ordered:.1%} of "
        f"{len(pairs)} articles"
    )
    return {"classifier_spearman_levels": rho or 0.0, "classifier_levels_ordered": ordered}


def source_section(files: dict[str, Path], count: int) -> dict[str, float]:
    rows = source_rows(files, count)
    wanted = np.array([row.labels["domain"] for row in rows])
    right = out_of_fold(rows, ours("domain")) == wanted
    worst = sorted((float(right[wanted == name].mean()), name) for name in files)[:3]
    print(
        f"domain: which of {len(files)} sources, {len(rows):,} documents, {FOLDS} folds: {right.mean():.1%} right; "
        "worst " + ", ".join(f"{name} {share:.0%}" for share, name in worst)
    )
    return {"classifier_domain_accuracy": float(right.mean())}


def speed_section(files: dict[str, Path], megabytes: float) -> dict[str, float]:
    """Text to scores, for a model with one head and a domain for each source."""
    rows = source_rows(files, 20)
    for number, row in enumerate(rows):
        row.labels["quality"] = float(number % 2)
    model = train(rows, CONFIG)
    read = {name: column([text for _, text in documents(file, megabytes)]) for name, file in files.items()}
    total, _ = speeds(f"scores: {len(model.bias)} outputs, {CONFIG.buckets:,} buckets", read, model.score, 3)
    return {"classifier_mb_s_core": total}


def classifier_section(corpus: str, quick: bool = False) -> dict[str, float]:
    """Print how well and how fast the classifier does on a directory of corpora; the figures by name."""
    files = sources(corpus)
    figures: dict[str, float] = {}
    for name, section in ((WEB, web_section), (LEVELS, level_section)):
        if name in files:
            figures |= section(corpus, files[name])
        else:
            print(f"{name}: not there, skipped")
    if len(files) > 1:
        figures |= source_section(files, 40 if quick else PER_SOURCE)
    return figures | speed_section(files, 2 if quick else 10)


def main() -> None:
    arguments = parser(__doc__).parse_args()
    print(f"trains some 25 small models and scores all sources: about a minute; {about()}")
    report(arguments.json, classifier_section(arguments.corpus, arguments.quick))


if __name__ == "__main__":
    main()
