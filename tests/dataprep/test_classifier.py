"""The quality classifier: what it learns, that it is the same each time, its file, and metrics against plain Python."""

import dataclasses
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dataprep import metrics
from dataprep.classifier import FORMAT, Classifier, ClassifierConfig
from dataprep.storage import UserError
from dataprep.train_classifier import LEAST_SLOPE, Row, _parts, _platt, read_rows, train

CONFIG = ClassifierConfig(buckets=1 << 14)
GOOD = ["theorem", "proof", "energy", "because", "therefore", "measured", "history", "method", "results", "explain"]
BAD = ["click", "buy", "cheap", "now", "free", "winner", "casino", "offer", "discount", "subscribe"]
PLAIN = [f"word{chr(97 + k)}" for k in range(26)]


def row(rng: random.Random, number: int) -> dict:
    """A text whose share of GOOD words is its quality, in one of two domains that its common words tell."""
    quality = rng.random()
    domain = rng.choice(["law", "sport"])
    common = PLAIN[:13] if domain == "law" else PLAIN[13:]
    words = [
        rng.choice(common) if rng.random() < 0.6 else rng.choice(GOOD if rng.random() < quality else BAD)
        for _ in range(60)
    ]
    labels = {"knowledge": round(5 * quality), "label": "good" if quality > 0.5 else "bad", "domain": domain}
    labels = {name: value for name, value in labels.items() if rng.random() < 0.9}
    return {"text": " ".join(words), "language": rng.choice(["en", "de"]), "id": str(number)} | labels


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    rng = random.Random(0)
    return [row(rng, n) for n in range(1500)]


@pytest.fixture(scope="module")
def labelled(rows, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("labels") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return str(path)


@pytest.fixture(scope="module")
def model(labelled) -> Classifier:
    return train(read_rows([labelled], CONFIG), CONFIG)


def texts(rows) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array([r["text"] for r in rows], pa.large_string())])


def test_every_head_is_learnt_and_calibrated(model):
    found = model.about["metrics"]
    assert model.heads == ("knowledge", "quality") and model.domains == ("law", "sport")
    assert found["knowledge"]["all"]["auc"] > 0.9 and found["knowledge"]["all"]["spearman"] > 0.8
    assert found["quality"]["all"]["auc"] > 0.9 and found["domain"]["all"]["accuracy"] > 0.95
    assert all(found[head]["all"]["ece"] < 0.12 for head in ("knowledge", "quality"))
    languages = found["quality"]["language"]
    assert set(languages) == {"de", "en"}
    assert sum(v["rows"] for v in languages.values()) == found["quality"]["all"]["rows"] > 80


def test_scores_of_unseen_texts(model):
    rng = random.Random("unseen")
    fresh = [row(rng, n) for n in range(300)]
    table = model.score(texts(fresh))
    assert table.schema.field("quality").type == pa.float32() and pa.types.is_dictionary(
        table.schema.field("domain").type
    )
    labelled = [n for n, r in enumerate(fresh) if "label" in r]
    quality = table["quality"].to_numpy()[labelled]
    assert metrics.auc(quality, np.array([fresh[n]["label"] == "good" for n in labelled])) > 0.9
    assert quality.min() >= 0 and quality.max() <= 1
    right = [d == r["domain"] for d, r in zip(table["domain"].to_pylist(), fresh, strict=True) if "domain" in r]
    assert np.mean(right) > 0.95


def test_scores_do_not_depend_on_neighbours(model, rows):
    whole = model.score(texts(rows[:50]))
    for n in (0, 7, 49):
        assert model.score(texts(rows[n : n + 1])).to_pylist() == whole.slice(n, 1).to_pylist()
    hostile = ["", " ", "\0\0", "😀" * 9, "a" * 100_000]
    table = model.score(pa.chunked_array([pa.array(hostile, pa.large_string())]))
    assert np.isfinite(table["knowledge"].to_numpy()).all() and len(set(table["quality"].to_pylist()[:3])) == 1
    assert len(model.score(pa.chunked_array([], pa.large_string()))) == 0


def test_the_file_is_the_same_for_any_order_of_rows_and_reads_back(model, rows, tmp_path):
    shuffled = random.Random(5).sample(rows, len(rows))
    columns = {name: [r.get(name) for r in shuffled] for name in ("text", "language", "knowledge", "label", "domain")}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    again = train(read_rows([str(tmp_path / "rows.parquet")], CONFIG), CONFIG)
    model.save(str(tmp_path / "a"))
    again.save(str(tmp_path / "b"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = Classifier.load(str(tmp_path / "a"))
    assert loaded.about["metrics"] == model.about["metrics"] and loaded.about["config"]["epochs"] == CONFIG.epochs
    assert loaded.score(texts(rows)).equals(model.score(texts(rows)))
    other = ClassifierConfig(buckets=1 << 14, seed=1)
    assert train(read_rows([str(tmp_path / "rows.parquet")], other), other).about["metrics"] != model.about["metrics"]


def test_rows_of_a_group_stay_together(rows):
    config = ClassifierConfig(held_out=0.5)
    grouped = [Row(r["text"].encode(), {}, {}, f"article {n % 40}") for n, r in enumerate(rows)]
    part = _parts(grouped, config)
    assert all(len(set(part[n::40])) == 1 for n in range(40)) and len(set(part)) == 3


def test_calibration_of_one_head():
    """Platt scaling finds the slope and shift that a score is off by, and never turns a head upside down."""
    z = np.random.default_rng(0).normal(size=20_000)
    y = (np.random.default_rng(1).random(20_000) < 1 / (1 + np.exp(-(3 * z - 1)))).astype(float)
    assert _platt(z, y) == pytest.approx((3, -1), abs=0.15)
    assert _platt(-z, y)[0] == LEAST_SLOPE
    assert np.isfinite(_platt(z, (z > 0).astype(float))).all()  # separable


@pytest.mark.parametrize(
    "line,message",
    [
        ('{"text": "a", "knowledge": 6}', "record 1: knowledge is 6; .* from 0 to 5"),
        ('{"text": "a", "knowledge": true}', "knowledge is True"),
        ('{"text": "a", "label": "fine"}', "label is 'fine'; it must be good or bad"),
        ('{"text": "a", "knowledge": -0.1}', "knowledge is -0.1"),
        ('{"text": "a", "label": 2}', "label is 2"),
        ('{"text": "a", "label": ""}', "label is ''"),
        ('{"text": "a", "label": true}', "label is True"),
        ('{"text": "a", "domain": 3}', "domain is 3"),
        ('{"text": "a", "domain": " "}', "domain is ' '"),
        ('{"text": ', "record 1: malformed JSON"),
        ('{"label": "good"}', "record 1: missing field"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "no label: passed over", "knowledge": null}\n' + line)
    with pytest.raises(UserError, match=message):
        list(read_rows([str(tmp_path / "rows.jsonl")], CONFIG))


def test_too_little_to_learn_from(labelled):
    some = list(read_rows([labelled], CONFIG))
    with pytest.raises(UserError, match="no row bears a label"):
        train([], CONFIG)
    with pytest.raises(UserError, match=r"labelled rows, .* too few"):
        train(some[:5], CONFIG)
    for labels in ({"quality": 1.0}, {"knowledge": 0.4, "domain": "law"}):
        alike = [dataclasses.replace(row, labels=labels) for row in some]
        with pytest.raises(UserError, match=r"(label|knowledge): all \d+ rows to train on bear the same label"):
            train(alike, CONFIG)
    with pytest.raises(UserError, match=r"training diverged: .*lower rate"):
        train(some, CONFIG.model_copy(update={"rate": 1e30}))
    with pytest.raises(ValidationError, match="power of two, such as 512"):
        ClassifierConfig(buckets=1000)


def broken(model: Classifier, path, change) -> str:
    model.save(str(path))
    size = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + size])
    about = json.loads(header["__metadata__"][FORMAT])
    change(about)
    header["__metadata__"][FORMAT] = json.dumps(about)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + path.read_bytes()[8 + size :])
    return str(path)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda about: about.update(version=99), "has version 99, this program reads 2"),
        (
            lambda about: about.update(heads=["quality"]),
            r"table is float32\[16384, 4\], not .*\[16384, 3\]",
        ),
        (lambda about: about.pop("heads"), "is no classifier of ours"),
        (lambda about: about["config"].update(buckets=float("inf")), "is no classifier of ours"),
        (
            lambda about: about["config"].update(buckets=64),
            r"table is float32\[16384, 4\], not .*\[64, 4\]",
        ),
    ],
)
def test_files_that_do_not_fit(model, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        Classifier.load(broken(model, tmp_path / "m.safetensors", change))


def test_files_that_are_no_models(model, tmp_path):
    path = tmp_path / "m.safetensors"
    model.save(str(path))
    for content in (b"", b"garbage", path.read_bytes()[:-9], b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match="is no classifier of ours"):
            Classifier.load(str(path))
    with pytest.raises(UserError, match=r"there is no classifier .*jobs/classifier.py"):
        Classifier.load(str(tmp_path / "none"))


small = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=30)


@given(small)
def test_metrics_by_definition(pairs):
    scores, labels = (np.array(x, float) for x in zip(*pairs, strict=True))
    positive = labels >= 2
    wins = [(a > b) + (a == b) / 2 for a in scores[positive] for b in scores[~positive]]
    found = metrics.auc(scores, positive)
    assert found == (pytest.approx(np.mean(wins)) if wins else None)
    ranked = [[np.sum(x < v) + (np.sum(x == v) + 1) / 2 for v in x] for x in (scores, labels)]
    rho = metrics.spearman(scores, labels)
    if rho is None:
        assert len(set(scores)) == 1 or len(set(labels)) == 1
    else:
        assert rho == pytest.approx(np.corrcoef(ranked)[0, 1])


def test_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    labels = (rng.random(20_000) < p).astype(float)
    assert metrics.calibration_error(p, labels) < 0.02
    assert metrics.calibration_error(np.clip(p + 0.2, 0, 2), labels) == pytest.approx(0.2, abs=0.01)
