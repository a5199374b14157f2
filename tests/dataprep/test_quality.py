"""Quality: rules per source and language, scores, tiers and aggregates, against plain Python over the same signals."""

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from dataprep.quality import SCORE, cuts, histograms, judge, measure
from dataprep.quality_report import BINS, EXAMPLES, aggregates, sheet, smallest
from dataprep.rules import RULE_SETS, RULES, TIERS, QualityConfig
from dataprep.signals import SIGNALS
from dataprep.storage import Attempt, UserError, add_up, read_table

SENTENCE = "the river ran past old mills and with it came that quiet talk of rain to be had in a long green valley"
WORDS = SENTENCE.split()
PROSE = " ".join(f"{a} {b}{k}" for k, (a, b) in enumerate(zip(WORDS * 9, WORDS[7:] * 13, strict=False)))
SPAM = "buy now cheap watches " * 100
CODE = "\n".join(f"x{k} = f({k}, y{k + 1})  # {k}" for k in range(90))
TEXTS = [PROSE, SPAM, CODE, "short.", "", PROSE[:300], PROSE + "\n" + PROSE, CODE + "\n" + CODE[:1500]]


def documents(texts: list[str], sources: list[str]) -> pa.Table:
    doc = [(k << 40) + 7 * k for k in range(len(texts))]
    columns = [pa.array(doc, pa.uint64()), pa.array(sources).dictionary_encode(), pa.array(texts, pa.large_string())]
    return pa.table(columns, names=["doc", "source", "text"])


def both() -> pa.Table:
    return documents(TEXTS * 2, ["web"] * len(TEXTS) + ["code"] * len(TEXTS))


def both_tables(documents: pa.Table, config: QualityConfig) -> tuple[pa.Table, pa.Table]:
    """(signals, quality) of documents that are the whole corpus."""
    measured = measure(documents, config)
    return measured, judge(documents, measured, config, cuts(histograms(measured, documents), config))


def score(documents: pa.Table, config: QualityConfig) -> pa.Table:
    return both_tables(documents, config)[1]


def row(text: str, config: QualityConfig, source: str = "web") -> dict[str, Any]:
    measured, table = both_tables(documents([text], [source]), config)
    return measured.to_pylist()[0] | table.to_pylist()[0]


def test_columns_are_the_contract() -> None:
    measured, table = both_tables(both(), QualityConfig())
    strings = pa.dictionary(pa.int32(), pa.string())
    expected = [("doc", pa.uint64()), *((name, pa.float32()) for name in SIGNALS)]
    expected += [("language", strings), ("language_score", pa.float32()), ("evaluation", strings)]
    expected += [("overlap", pa.float32()), ("overlap_ngrams", pa.uint32()), ("score", pa.float32())]
    assert measured.schema == pa.schema(expected)
    expected = [("doc", pa.uint64()), ("language", strings), ("score", pa.float32()), ("failed", pa.list_(strings))]
    assert table.schema == pa.schema([*expected, ("tier", strings), ("contaminated", pa.bool_())])
    assert table["doc"].to_pylist() == measured["doc"].to_pylist() == both()["doc"].to_pylist()


def test_failed_score_and_tier_follow_from_the_signals() -> None:
    changed = {"gopher-quality.words": (5, None), "gopher-repetition.top_2gram": (None, 0.05)}
    config = QualityConfig(rules=tuple(RULE_SETS), by_source={"code": ["gopher-repetition"]}, thresholds=changed)
    measured, table = both_tables(both(), config)
    for signals, found, source in zip(
        measured.to_pylist(), table.to_pylist(), both()["source"].to_pylist(), strict=True
    ):
        assert signals["language"] in ("en", "und")
        failed = []
        for rule, (low, high) in (RULES | changed).items():
            name, signal = rule.split(".")
            value = np.float32(signals[signal])
            outside = (low is not None and value < np.float32(low)) or (high is not None and value > np.float32(high))
            if outside and (source == "web" or name == "gopher-repetition"):
                failed.append(rule)
        assert found["failed"] == failed
        parts = [min(1.0, max(0.0, (signals[name] - worst) / (best - worst))) for name, (worst, best) in SCORE.items()]
        assert found["score"] == pytest.approx(sum(parts) / len(parts), rel=1e-5)
        low_tier = failed or found["score"] < 0.7
        assert found["tier"] == ("low" if low_tier else "high" if found["score"] >= 0.9 else "medium")


def test_verdicts_a_person_would_give() -> None:
    config = QualityConfig()
    assert row(PROSE, config)["tier"] == "high" and row(PROSE, config)["failed"] == []
    spam = {"gopher-quality.stop_words", "gopher-repetition.duplicate_5gram", "gopher-repetition.top_4gram"}
    assert spam <= set(row(SPAM, config)["failed"])
    assert "gopher-quality.words" in row("short.", config)["failed"]
    assert row("", config)["tier"] == "low"
    assert "gopher-quality.stop_words" in row(CODE, config)["failed"]


GERMAN = "Das ist ein kurzer deutscher Text über das Wetter und den Regen, der gestern auf die Felder fiel."
CHINESE = "我们在学习如何清洗数据，这是一个很长的句子。" * 12


def test_rule_sets_judge_the_languages_they_are_for() -> None:
    every = QualityConfig(rules=tuple(RULE_SETS))
    assert row(GERMAN, every)["language"] == "de" and row(GERMAN, every)["failed"] == []
    assert row(CHINESE, every)["language"] == "zh" and row(CHINESE, every)["failed"] == []
    unknown = row("12 34 12 34 12 34 12 34", every)
    assert unknown["language"] == "und" and "gopher-quality.letter_words" in unknown["failed"]
    wider = QualityConfig(languages={"gopher-quality": ["en", "de"], "gopher-repetition": ["zh"]})
    assert row(GERMAN, wider)["failed"] == ["gopher-quality.words", "gopher-quality.stop_words"]
    assert "gopher-repetition.duplicate_10gram" in row(CHINESE, wider)["failed"]
    twice = f"{PROSE}\n{PROSE}"
    assert row(twice, every)["language"] == "en" and "gopher-repetition.duplicate_lines" in row(twice, every)["failed"]
    assert row(twice, wider)["failed"] == []


def test_a_source_without_rules_fails_none_and_has_all_tiers() -> None:
    config = QualityConfig(by_source={"web": []})
    table = score(documents(TEXTS, ["web"] * len(TEXTS)), config)
    assert not any(table["failed"].to_pylist())
    assert set(table["tier"].to_pylist()) == set(TIERS)


def test_a_value_on_the_limit_passes() -> None:
    words = [f"w{k}" for k in range(100)]
    text = " ".join(words[:90]) + " " + " ".join("#" for _ in range(10))
    config = QualityConfig(languages={"gopher-quality": [row(text, QualityConfig())["language"]]})
    assert row(text, config)["hash_ratio"] == np.float32(0.1)
    assert "gopher-quality.hash_ratio" not in row(text, config)["failed"]
    assert "gopher-quality.hash_ratio" in row(text + " #", config)["failed"]


def test_tiers_by_quantile_of_source_and_language() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, n)) for n in rng.integers(5, 190, 400)]
    source = documents(texts + texts, ["web"] * 400 + ["books"] * 400)
    tiers = [{"source": "web", "by": "quantile", "low": 0.25, "high": 0.8}, {"low": 0, "high": 0}]
    config = QualityConfig(rules=(), tiers=tiers)
    table = score(source, config)
    tier, points = table["tier"].to_pylist(), table["score"].to_numpy()
    assert set(tier[400:]) == {"high"}
    measured = measure(source, config)
    for language in set(measured["language"].to_pylist()):
        here = [k for k, l in enumerate(measured["language"].to_pylist()[:400]) if l == language]
        shares = [sum(tier[k] == name for k in here) / len(here) for name in ("low", "high")]
        assert len(here) < 50 or shares == pytest.approx([0.25, 0.2], abs=0.04)
        ranked = sorted(here, key=lambda k: points[k])
        assert [TIERS.index(tier[k]) for k in ranked] == sorted(TIERS.index(tier[k]) for k in ranked)


def test_quantiles_at_the_ends_and_of_equal_scores() -> None:
    same = documents([PROSE] * 7, ["web"] * 7)
    for low, high, expected in ((0, 0, "high"), (0, 1, "medium"), (1, 1, "low"), (0.1, 0.6, "medium")):
        config = QualityConfig(tiers=[{"by": "quantile", "low": low, "high": high}])
        assert set(score(same, config)["tier"].to_pylist()) == {expected}


def test_cuts_do_not_depend_on_the_partitions() -> None:
    config = QualityConfig(tiers=[{"by": "quantile", "low": 0.4, "high": 0.6}])
    measured = measure(both(), config)
    parts = [histograms(measured.slice(k, 3), both().slice(k, 3)) for k in range(0, len(measured), 3)]
    whole = cuts(histograms(measured, both()), config)
    assert cuts(add_up(parts), config) == cuts(add_up(parts[::-1]), config) == whole


def test_rows_do_not_depend_on_the_batch_and_survive_storage(tmp_path) -> None:
    config = QualityConfig(by_source={"code": []})
    measured, whole = both_tables(both(), config)
    parts = [score(both().slice(k, 3), config) for k in range(0, len(whole), 3)]
    assert pa.concat_tables(parts, promote_options="permissive").to_pylist() == whole.to_pylist()
    out = Attempt(str(tmp_path), "p", {})
    out.table("signals", measured)
    out.table("quality", whole)
    commit = out.commit({})
    back, measured_back = read_table(commit.path("quality")), read_table(commit.path("signals"))
    assert back.schema == whole.schema and back.equals(whole)
    assert aggregates(back, both(), measured_back) == aggregates(whole, both(), measured)


def test_aggregates_count_every_document() -> None:
    source = both()
    measured, table = both_tables(source, QualityConfig(by_source={"code": []}))
    found = aggregates(table, source, measured)
    rows = [m | r for m, r in zip(measured.to_pylist(), table.to_pylist(), strict=True)]
    sources, texts = source["source"].to_pylist(), source["text"].to_pylist()
    cells: dict[tuple, list[int]] = {}
    for r, name, text in zip(rows, sources, texts, strict=True):
        cell = cells.setdefault((name, r["language"], r["tier"]), [0, 0])
        cell[0] += 1
        cell[1] += len(text.encode())
    assert {(c["source"], c["language"], c["tier"]): [c["documents"], c["bytes"]] for c in found["cells"]} == cells
    for name in ("web", "code"):
        mine = [r for r, s in zip(rows, sources, strict=True) if s == name]
        for tier in TIERS:
            docs = [e["doc"] for e in found["examples"][name].get(tier, [])]
            assert len(docs) == min(EXAMPLES, sum(r["tier"] == tier for r in mine))
            assert set(docs) <= {r["doc"] for r in mine if r["tier"] == tier}
        for rule in RULES:
            assert found["failed"][name].get(rule, 0) == sum(rule in r["failed"] for r in mine)
        for tier in TIERS:
            scores = [r["score"] for r in mine if r["tier"] == tier]
            bins = [min(BINS - 1, int(np.float32(score) * np.float32(BINS))) for score in scores]
            assert found["scores"][name][tier] == [bins.count(k) for k in range(BINS)]


def test_examples_are_those_of_smallest_rank_in_any_order() -> None:
    source = documents([f"{PROSE} {k}" for k in range(40)], ["web"] * 40)

    def examples(documents: pa.Table) -> list[dict[str, Any]]:
        measured, table = both_tables(documents, QualityConfig())
        return aggregates(table, documents, measured)["examples"]["web"]["high"]

    forward = examples(source)
    assert examples(source.take(list(range(39, -1, -1)))) == forward
    assert [e["rank"] for e in forward] == sorted(e["rank"] for e in forward)
    ranks = sorted(examples(source.slice(k, 1))[0]["rank"] for k in range(40))
    assert [e["rank"] for e in forward] == ranks[:EXAMPLES]
    assert forward[0]["excerpt"] == PROSE[:200]
    halves = [{"web": {"high": examples(source.slice(k, 20))}} for k in (20, 0)]
    assert smallest(halves) == {"web": {"high": forward}}


def test_the_sheet_escapes_what_documents_say() -> None:
    hostile = "<script>alert(1)</script> & </pre>\u202e\x1b"
    measured, table = both_tables(documents([hostile], ["web"]), QualityConfig())
    page = sheet([{"source": "web", "id": hostile, "text": hostile} | measured.to_pylist()[0] | table.to_pylist()[0]])
    assert "<script" not in page and page.count("</pre>") == 1 and page.count("&lt;script&gt;") == 2
    assert "gopher-quality.words" in page and "compression" in page
    assert "\u202e" not in page and page.count("\\u202e\\x1b") == 2


class Lengths:
    """Stands for a trained classifier."""

    @classmethod
    def load(cls, path: str) -> "Lengths":
        return cls()

    def score(self, text: pa.ChunkedArray) -> pa.Table:
        values = [min(1.0, len(t) / 5000) for t in text.to_pylist()]
        return pa.table({"depth": pa.array(values, pa.float32()), "domain": pa.array(["x"] * len(text))})


def test_a_classifiers_heads_are_recorded_and_may_be_the_score(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "dataprep.classifier", SimpleNamespace(Classifier=Lengths))
    measured = measure(both(), QualityConfig(classifier="model", score="depth"))
    assert measured["score"].to_pylist() == measured["depth"].to_pylist()
    assert measured["depth"][0].as_py() == np.float32(len(TEXTS[0]) / 5000)
    beside = measure(both(), QualityConfig(classifier="model"))
    assert beside["depth"] == measured["depth"] and beside["score"] == measure(both(), QualityConfig())["score"]
    with pytest.raises(UserError, match="'width': model has no such head; there are signals, depth"):
        measure(both(), QualityConfig(classifier="model", score="width"))


def test_no_documents() -> None:
    empty = both().slice(0, 0)
    measured, table = both_tables(empty, QualityConfig())
    assert len(table) == 0
    assert aggregates(table, empty, measured)["cells"] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rules": ["c5"]}, r"rules.0\n.*'gopher-quality'.*'c5'"),
        ({"by_source": {"web": ["gofer"]}}, r"by_source.web.0\n.*'fineweb'.*'gofer'"),
        ({"languages": {"gofer": ["en"]}}, r"languages.gofer.*\n.*'fineweb'.*'gofer'"),
        ({"languages": {"c4": ["english"]}}, r"languages.c4.0\n.*ISO 639-1 code.*'english'"),
        ({"tiers": [{"language": "zz"}]}, r"tiers.0.language\n.*ISO 639-1"),
        ({"thresholds": {"words": [1, 2]}}, "thresholds names the rule 'words'; there are gopher-quality.words"),
        ({"thresholds": {"c4.lorem_ipsum": [3, 2]}}, "put the smaller first"),
        ({"tiers": [{"low": 0.9, "high": 0.5}]}, "low must not be above high"),
        ({"score": "depth"}, "name the model in `classifier`"),
        ({"decontaminate": {"sets": {"x": {"path": "p", "feilds": ["a"]}}}}, "feilds"),
    ],
)
def test_configuration_mistakes_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        QualityConfig(**values)
