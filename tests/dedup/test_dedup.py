"""Deduplication as a whole against all pairs by brute force, on generated corpora in several scripts."""

import unicodedata
from itertools import combinations

import numpy as np
import pytest

from dedup.config import DedupConfig
from tests.dedup.corpus import dedup, jaccard, planted, shingles, table

ALPHABETS = {
    "english": ([f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)], " "),
    "chinese": ([chr(0x4E00 + i) for i in range(2000)], ""),
    "japanese": ([chr(0x3042 + i) for i in range(80)] + [chr(0x6F22 + i) for i in range(800)], ""),
    "thai": ([chr(0x0E01 + i) + mark for i in range(46) for mark in ("", "\u0e34", "\u0e48", "\u0e34\u0e48")], ""),
}


@pytest.mark.parametrize("language", ALPHABETS)
def test_removals_are_right_and_few_are_missed(language):
    config = DedupConfig(seed=4)
    texts = planted(np.random.default_rng(7), 300, *ALPHABETS[language])
    sets = [shingles(t) for t in texts]
    truth = {(a, b): jaccard(sets[a], sets[b]) for a, b in combinations(range(len(texts)), 2)}
    removed = {row["doc"]: row for row in dedup(table(texts), config).to_pylist()}

    for doc, row in removed.items():
        assert row["keeper"] not in removed and row["cluster"] == row["keeper"] != doc
        similar = jaccard(sets[doc], sets[row["keeper"]])
        assert row["jaccard"] == pytest.approx(similar, abs=1e-6) or row["reason"] == "exact"
        assert similar >= config.threshold
        assert (row["reason"] == "exact") == (texts[doc] in texts[:doc])
    near = [pair for pair, similarity in truth.items() if similarity >= 0.85]
    missed = [pair for pair in near if not removed.keys() & set(pair)]
    assert len(near) > 200 and len(missed) <= 0.02 * len(near)


def test_the_order_of_documents_and_of_batches_does_not_matter(monkeypatch):
    random = np.random.default_rng(3)
    texts = planted(random, 200, *ALPHABETS["english"])
    documents, config = table(texts), DedupConfig()
    expected = dedup(documents, config)
    monkeypatch.setattr("dedup.signatures.BATCH_BYTES", 1000)
    monkeypatch.setattr("dedup.verify.BATCH_BYTES", 700)
    assert len(expected) > 50
    for _ in range(3):
        assert dedup(documents.take(random.permutation(len(texts))), config).equals(expected)


def test_digits_are_folded_for_candidates_only():
    words = ALPHABETS["english"][0]
    page = " ".join(f"{w} on 2024 at {i}" for i, w in enumerate(words[:60]))
    dated = " ".join(f"{w} on 1999 at {i + 100}" for i, w in enumerate(words[:60]))
    assert jaccard(shingles(page), shingles(dated)) < 0.1
    assert len(dedup(table([page, dated]), DedupConfig())) == 0
    assert len(dedup(table([page, page + " more"]), DedupConfig())) == 1


def test_case_punctuation_and_line_breaks_do_not_hide_a_duplicate():
    text = " ".join(ALPHABETS["english"][0][:80])
    variants = [text, text.upper(), text.replace(" ", ",\r\n"), text + "!", text.replace(" ", "\u200b ")]
    removed = dedup(table(variants), DedupConfig())
    assert len(removed) == 4 and set(removed["jaccard"].to_pylist()) == {1.0}
    crlf = dedup(table([text.replace(" ", "\n"), text.replace(" ", "\r\n")]), DedupConfig())
    assert crlf["reason"].to_pylist() == ["exact"] and crlf["keeper"].to_pylist() == [1]  # the longer in bytes


def test_right_to_left_and_marked_text():
    words = [a + b + c for a in "אבגדהוזח" for b in "טיכלמנ" for c in "סעפצק"]
    text = " ".join(words)
    pointed = " ".join(w[0] + "\u05b8" + w[1:] for w in words)
    assert len(dedup(table([text, text + " שלום"]), DedupConfig())) == 1
    assert len(dedup(table([text, pointed]), DedupConfig())) == 0  # a candidate; not the same words
    composed = unicodedata.normalize("NFC", "é ".join(ALPHABETS["english"][0][:50]))
    assert len(dedup(table([composed, composed + "\u200d"]), DedupConfig())) == 1


def test_exact_only_finds_no_near_duplicates():
    text = " ".join(ALPHABETS["english"][0][:80])
    removed = dedup(table([text, text + " x", text]), DedupConfig(near=False))
    assert removed.to_pylist() == [{"doc": 2, "reason": "exact", "keeper": 0, "jaccard": 1.0, "cluster": 0}]


def test_an_empty_corpus():
    assert len(dedup(table([]), DedupConfig())) == 0
