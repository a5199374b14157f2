"""Quality: rules per source, scores, tiers and aggregates, against plain Python over the same signals."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from dataprep.quality import (
    BINS,
    EXAMPLES,
    RULE_SETS,
    RULES,
    SCORE,
    TIERS,
    QualityConfig,
    aggregates,
    score,
)
from dataprep.storage import Attempt, read_table
from kernels.gopher import SIGNALS

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


def row(text: str, config: QualityConfig, source: str = "web") -> dict[str, Any]:
    return score(documents([text], [source]), config).to_pylist()[0]


def test_columns_are_the_contract() -> None:
    table = score(both(), QualityConfig())
    strings = pa.dictionary(pa.int32(), pa.string())
    expected = [("doc", pa.uint64()), *((name, pa.float32()) for name in SIGNALS)]
    expected += [("failed", pa.list_(strings)), ("score", pa.float32()), ("tier", strings)]
    assert table.schema == pa.schema(expected)
    assert table["doc"].to_pylist() == both()["doc"].to_pylist()


def test_failed_score_and_tier_follow_from_the_signals() -> None:
    config = QualityConfig(
        by_source={"code": ["gopher_repetition"]}, thresholds={"words": (5, None), "top_2gram": (None, 0.05)}
    )
    for found, source in zip(score(both(), config).to_pylist(), both()["source"].to_pylist(), strict=True):
        limits = RULES | {"words": (5, None), "top_2gram": (None, 0.05)}
        failed = []
        for rule in RULE_SETS["gopher" if source == "web" else "gopher_repetition"]:
            low, high = limits[rule]
            value = np.float32(found[rule])
            if (low is not None and value < np.float32(low)) or (high is not None and value > np.float32(high)):
                failed.append(rule)
        assert found["failed"] == failed
        parts = [min(1.0, max(0.0, (found[name] - worst) / (best - worst))) for name, (worst, best) in SCORE.items()]
        assert found["score"] == pytest.approx(sum(parts) / len(parts), rel=1e-5)
        low_tier = failed or found["score"] < config.low
        assert found["tier"] == ("low" if low_tier else "high" if found["score"] >= config.high else "medium")


def test_verdicts_a_person_would_give() -> None:
    assert row(PROSE, QualityConfig())["tier"] == "high"
    assert row(PROSE, QualityConfig())["failed"] == []
    assert {"stop_words", "duplicate_5gram", "top_4gram"} <= set(row(SPAM, QualityConfig())["failed"])
    assert "words" in row("short.", QualityConfig())["failed"]
    assert row("", QualityConfig())["tier"] == "low"
    assert "stop_words" in row(CODE, QualityConfig())["failed"]


def test_a_source_without_rules_fails_none_and_has_all_tiers() -> None:
    config = QualityConfig(by_source={"web": []})
    table = score(documents(TEXTS, ["web"] * len(TEXTS)), config)
    assert not any(table["failed"].to_pylist())
    assert set(table["tier"].to_pylist()) == set(TIERS)


def test_a_value_on_the_limit_passes() -> None:
    words = [f"w{k}" for k in range(100)]
    text = " ".join(words[:90]) + " " + " ".join("#" for _ in range(10))
    assert row(text, QualityConfig())["hash_ratio"] == np.float32(0.1)
    assert "hash_ratio" not in row(text, QualityConfig())["failed"]
    assert "hash_ratio" in row(text + " #", QualityConfig())["failed"]


def test_rows_do_not_depend_on_the_batch_and_survive_storage(tmp_path) -> None:
    config = QualityConfig(by_source={"code": []})
    whole = score(both(), config)
    parts = [score(both().slice(k, 3), config) for k in range(0, len(whole), 3)]
    assert pa.concat_tables(parts, promote_options="permissive").to_pylist() == whole.to_pylist()
    out = Attempt(str(tmp_path), "p", {})
    out.table("quality", whole)
    back = read_table(out.commit({}).path("quality"))
    assert back.schema == whole.schema
    assert back.equals(whole)
    assert aggregates(back, both()) == aggregates(whole, both())


def test_aggregates_count_every_document() -> None:
    source = both()
    table = score(source, QualityConfig(by_source={"code": []}))
    found = aggregates(table, source)
    rows, sources = table.to_pylist(), source["source"].to_pylist()
    assert found["documents"] == {"web": len(TEXTS), "code": len(TEXTS)}
    for name in ("web", "code"):
        mine = [r for r, s in zip(rows, sources, strict=True) if s == name]
        for tier in TIERS:
            assert found["tiers"][name].get(tier, 0) == sum(r["tier"] == tier for r in mine)
            docs = [e["doc"] for e in found["examples"][name].get(tier, [])]
            assert len(docs) == min(EXAMPLES, sum(r["tier"] == tier for r in mine))
            assert set(docs) <= {r["doc"] for r in mine if r["tier"] == tier}
        for rule in RULES:
            assert found["failed"][name].get(rule, 0) == sum(rule in r["failed"] for r in mine)
        bins = [min(BINS - 1, int(np.float32(r["score"]) * np.float32(BINS))) for r in mine]
        assert found["scores"][name] == [bins.count(k) for k in range(BINS)]


def test_examples_are_those_of_smallest_rank_in_any_order() -> None:
    source = documents([f"{PROSE} {k}" for k in range(40)], ["web"] * 40)
    config = QualityConfig()
    forward = aggregates(score(source, config), source)["examples"]["web"]["high"]
    backward_source = source.take(list(range(39, -1, -1)))
    assert aggregates(score(backward_source, config), backward_source)["examples"]["web"]["high"] == forward
    assert [e["rank"] for e in forward] == sorted(e["rank"] for e in forward)
    every = [aggregates(score(source.slice(k, 1), config), source.slice(k, 1)) for k in range(40)]
    ranks = sorted(e["examples"]["web"]["high"][0]["rank"] for e in every)
    assert [e["rank"] for e in forward] == ranks[:EXAMPLES]
    assert forward[0]["excerpt"] == PROSE[:200]


def test_no_documents() -> None:
    empty = both().slice(0, 0)
    table = score(empty, QualityConfig())
    assert len(table) == 0
    assert aggregates(table, empty)["documents"] == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rules": ["c5"]}, "rules names the rule set 'c5'; there are gopher"),
        ({"by_source": {"web": ["gofer"]}}, "by_source.web names the rule set 'gofer'"),
        ({"thresholds": {"wrds": [1, 2]}}, "thresholds names the rule 'wrds'; there are words"),
        ({"thresholds": {"words": [3, 2]}}, "put the smaller first"),
        ({"low": 0.9, "high": 0.5}, "low must not be above high"),
    ],
)
def test_configuration_mistakes_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("[", r"\[")):
        QualityConfig(**values)
