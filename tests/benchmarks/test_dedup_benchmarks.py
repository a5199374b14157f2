"""The deduplication benchmarks on small inputs whose answers are known."""

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_array

from benchmarks import dedup_quality, dedup_scale
from tests.corpora import write
from tests.dedup.corpus import jaccard, planted, shingles

WORDS = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Two sources with planted duplicates, and the true pairs of one of them by brute force."""
    for number, name in enumerate(("one", "two")):
        texts = planted(np.random.default_rng(number), 150, WORDS)
        write(tmp_path, name, ({"id": f"{name}/{i}", "text": text} for i, text in enumerate(texts)))
        sets = [shingles(text) for text in texts]
        pairs = [(a, b, jaccard(sets[a], sets[b])) for a, b in combinations(range(len(texts)), 2)]
        rows = ["id1\tid2\tjaccard", *(f"{name}/{a}\t{name}/{b}\t{j}" for a, b, j in pairs if j >= 0.5)]
        (tmp_path / "labels/exact_jaccard").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"labels/exact_jaccard/{name}.pairs.tsv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_quality_agrees_with_brute_force(corpus, monkeypatch, capsys):
    arguments = ["x", "--corpus", str(corpus), "--quick", "--json", str(corpus / "figures.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    dedup_quality.main()
    figures = json.loads((corpus / "figures.json").read_text())
    assert figures["recall_085"] > 0.97 and figures["precision"] == 1 and figures["keeper_violations"] == 0
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(("| one", "| two"))]
    assert len(rows) == 2
    for _, name, _, _, at, above, told, _ in rows:
        given = (corpus / f"labels/exact_jaccard/{name.strip()}.pairs.tsv").read_text().splitlines()[1:]
        similar = [float(row.split("\t")[2]) for row in given]
        assert int(at.split()[0]) == sum(s >= 0.8 for s in similar)
        assert int(above.split()[0]) == int(told.split()[0]) == sum(s >= 0.85 for s in similar)


def test_every_pair_is_found():
    random = np.random.default_rng(5)
    sets = [np.unique(random.integers(0, 12, random.integers(0, 9))) for _ in range(80)]
    elements, offsets = np.concatenate(sets), np.cumsum([0, *map(len, sets)])
    rows = csr_array((np.ones(len(elements), np.int32), elements, offsets), shape=(80, 12))
    found = dedup_quality.all_pairs(rows, 0.3)
    plain = [(a, b, jaccard(set(sets[a]), set(sets[b]))) for b in range(80) for a in range(b)]
    assert sorted(zip(*(c.tolist() for c in found), strict=True)) == sorted(p for p in plain if p[2] >= 0.3)


def test_scale_removes_what_was_planted(monkeypatch):
    monkeypatch.setattr(dedup_scale, "PARTITION", 2000)
    figures = dedup_scale.measure(10_000, workers=0)
    assert figures["docs"] == 10_000 and figures["removed"] > 1500
    assert 0.99 < figures["removed_share"] <= 1
