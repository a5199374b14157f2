"""The classifier's benchmark on a small corpus of its own: labels as documented, and no row judged by its own label."""

import random

import numpy as np

from benchmarks import classifier_quality as benchmark
from benchmarks.common import installed
from dataprep.train_classifier import Row
from tests.corpora import write

LANGUAGES = ("aaa", "bbb")


def test_sections_on_a_small_corpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "CONFIG", benchmark.ClassifierConfig(buckets=1 << 12))
    rng = random.Random(0)
    (tmp_path / "labels").mkdir()
    lines, documents = ["id\tlang\tporn\tunnatural\tlang_correct"], []
    for n in range(400):
        bad = n % 3 == 0
        words = rng.choices(["spam", "offer", "the"] if bad else ["essay", "reason", "the"], k=20)
        documents.append({"id": f"w{n}", "text": " ".join(words), "source": "web"})
        lines.append(f"w{n}\t{rng.choice(LANGUAGES)}\t0\t{0.6 if bad else 0.2}\t1")
    (tmp_path / "labels" / f"{benchmark.WEB}.tsv").write_text("\n".join(lines))
    write(tmp_path, benchmark.WEB, documents)
    write(
        tmp_path, "other", [{"id": f"o{n}", "text": f"entirely other words {n}", "source": "other"} for n in range(60)]
    )
    figures = benchmark.classifier_section(tmp_path, quick=False)
    assert figures["classifier_auc"] > 0.95 and figures["classifier_mb_s_core"] > 0
    rows = dict(line.split(" | ", 1) for line in capsys.readouterr().out.splitlines() if line.count(" | ") == 6)
    assert {"| aaa", "| bbb"} <= set(rows) and rows["| all"].startswith("400 | 134 | ")
    assert "classifier_spearman_levels" not in figures
    assert ("classifier_auc_peer" in figures) == installed("sklearn")


def test_out_of_fold_rows_are_scored_by_models_that_saw_none_of_their_unit():
    rows = [Row(str(n).encode(), {"quality": 1.0}, {}, f"unit {n % 20}") for n in range(200)]

    def learn(known, asked, head):
        units = {row.unit for row in known}
        return np.array([float(row.text) if row.unit not in units else np.nan for row in asked])

    assert benchmark.out_of_fold(rows, learn, "quality").tolist() == list(range(200))
