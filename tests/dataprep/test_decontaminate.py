"""Decontamination against a plain reference in Python, and planted contamination as it is found in the wild."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataprep import decontaminate
from dataprep.decontaminate import DecontaminateConfig, Index
from dataprep.storage import UserError
from kernels.membership import bitmap, members
from kernels.words import reference_words

QUESTIONS = [
    "A train leaves the station at nine in the morning and travels north at sixty miles an hour; when does it arrive?",
    "Which of the following planets has the largest number of moons that have been confirmed by astronomers so far?",
    "What is the boiling point of water?",
    "Why?",
]
FILLER = "some unrelated words about rivers and mills and the quiet valley that nobody ever asks a question about "


def column(texts: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts, pa.large_string())])


def write(folder, items: list[str], name: str = "quiz.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps({"text": item}) + "\n" for item in items))
    return str(path)


def found(texts: list[str], **values) -> list[dict]:
    index = Index(DecontaminateConfig.model_validate(values))
    return pa.table(index.overlaps(column(texts))).to_pylist()


def grams(text: str, n: int, shortest: int) -> set[tuple[str, ...]]:
    words = list(reference_words(text, "verification"))
    if len(words) < shortest:
        return set()
    size = min(n, len(words))
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def holds(text: str, gram: tuple[str, ...]) -> bool:
    words = list(reference_words(text, "verification"))
    return any(tuple(words[i : i + len(gram)]) == gram for i in range(len(words) - len(gram) + 1))


def test_planted_contamination_is_found_whatever_its_case_and_punctuation(tmp_path):
    spoiled = QUESTIONS[0].upper().replace(" ", "\n-  ").replace(";", " ...") + "!!"
    texts = [
        FILLER + spoiled + FILLER,
        FILLER,
        FILLER + "what is THE boiling, point (of) water? It is " + FILLER,  # a short item is matched whole
        FILLER + "what is the boiling point of milk?",
        FILLER + "Why? " + FILLER,
        FILLER + " ".join(QUESTIONS[1].split()[:15]) + " " + FILLER,  # a part of it
        "",
    ]
    rows = found(texts, sets={"quiz": write(tmp_path, QUESTIONS)})
    assert [r["evaluation"] for r in rows] == ["quiz", None, "quiz", None, None, "quiz", None]
    full = len(QUESTIONS[0].split()) - 12
    assert (rows[0]["overlap"], rows[0]["overlap_ngrams"]) == (1.0, full)
    assert (rows[2]["overlap"], rows[2]["overlap_ngrams"]) == (1.0, 1)
    assert rows[5]["overlap"] == np.float32(3 / (len(QUESTIONS[1].split()) - 12)) and rows[5]["overlap_ngrams"] == 3
    assert all(r["overlap"] == 0 for r in rows if r["evaluation"] is None)


WORD = st.sampled_from(["a", "B", "c", "漢", "é"])
TEXT = st.lists(st.tuples(WORD, st.sampled_from([" ", ", ", "\n"])), max_size=14).map(
    lambda pairs: "".join(a + b for a, b in pairs)
)


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(TEXT, min_size=1, max_size=4), items=st.lists(TEXT, min_size=1, max_size=6))
def test_overlaps_equal_the_reference(tmp_path_factory, texts, items):
    items = [item if item.strip() else "x" for item in items]
    path = write(tmp_path_factory.mktemp("sets"), items)
    for text, row in zip(texts, found(texts, sets={"s": path}, ngram=4, shortest=2), strict=True):
        best = max(
            (sum(holds(text, g) for g in wanted) / len(wanted), sum(holds(text, g) for g in wanted))
            if (wanted := grams(item, 4, 2))
            else (0.0, 0)
            for item in items
        )
        assert (row["overlap"], row["overlap_ngrams"]) == (np.float32(best[0]), best[1])
        assert row["evaluation"] == ("s" if best[1] else None)


def test_the_set_with_the_largest_overlap_is_named_and_rows_do_not_depend_on_the_batch(tmp_path, monkeypatch):
    sets = {"a": write(tmp_path, QUESTIONS[:1], "a.jsonl"), "b": write(tmp_path, QUESTIONS[1:], "b.jsonl")}
    half = " ".join(QUESTIONS[0].split()[:16])
    texts = [half + " and " + QUESTIONS[1], half, FILLER] * 20
    rows = found(texts, sets=sets)
    assert [r["evaluation"] for r in rows] == ["b", "a", None] * 20
    monkeypatch.setattr("dataprep.decontaminate.CHUNK", 300)
    assert found(texts, sets=sets) == rows
    assert found(texts[1:2], sets=sets) == rows[1:2]


def test_what_many_items_share_is_no_evidence(tmp_path):
    template = "answer the following question with one of the four choices and nothing else please now "
    items = [template + f"question number {k} about subject {k * 7} asks what {k} is" for k in range(150)]
    path = write(tmp_path, [*items, template])
    rows = found([template * 3, items[7]], sets={"quiz": path})
    assert rows[0]["evaluation"] is None and rows[1]["overlap"] == 1.0
    index = Index(DecontaminateConfig(sets={"quiz": path}))
    assert index.passed_over == {"quiz": 1} and index.total == 150  # the template alone
    assert Index(DecontaminateConfig(sets={"quiz": write(tmp_path, QUESTIONS)})).passed_over == {"quiz": 1}  # "Why?"


def test_items_from_several_fields_parquet_and_text(tmp_path):
    rows = [{"question": QUESTIONS[2], "choices": ["one hundred degrees", {"b": 212}], "n": 1}]
    pq.write_table(
        pa.table({"question": [QUESTIONS[2]], "choices": [["one hundred", "degrees"]]}), tmp_path / "q.parquet"
    )
    (tmp_path / "q.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "q.txt").write_text("\n".join(QUESTIONS) + "\n\n")
    sets = {
        "parquet": {"path": str(tmp_path / "q.parquet"), "fields": ["question", "choices"]},
        "jsonl": {"path": str(tmp_path / "q.jsonl"), "fields": ["question", "choices"]},
        "text": str(tmp_path / "q.txt"),
    }
    config = DecontaminateConfig.model_validate({"sets": sets})
    assert decontaminate.items("parquet", config.sets["parquet"]) == [f"{QUESTIONS[2]}\none hundred\ndegrees"]
    assert decontaminate.items("jsonl", config.sets["jsonl"]) == [f"{QUESTIONS[2]}\none hundred degrees\n212"]
    assert decontaminate.items("text", config.sets["text"]) == QUESTIONS


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("none.jsonl", None, ["text"], "quality.decontaminate.sets.quiz: .*none.jsonl cannot be read"),
        ("bad.jsonl", '{"text": "x"}\n{"te', ["text"], "sets.quiz: .*bad.jsonl, record 1: malformed JSON"),
        ("x.jsonl", '{"question": "x"}\n', ["text"], "x.jsonl, record 0: missing field"),
        ("x.jsonl", '{"text": "x"}\n', ["text", "choices"], "x.jsonl, record 0 has no field 'choices'"),
        ("x.jsonl", "", ["text"], "has no items"),
        ("x.csv", "a,b", ["text"], "quality.decontaminate.sets.quiz: .*x.csv has none of the suffixes"),
    ],
)
def test_mistakes_are_one_clear_message(tmp_path, name, content, fields, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Index(DecontaminateConfig.model_validate({"sets": {"quiz": {"path": str(tmp_path / name), "fields": fields}}}))


def test_nothing_is_found_without_sets():
    assert found([FILLER, ""]) == [{"evaluation": None, "overlap": 0.0, "overlap_ngrams": 0}] * 2


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.lists(st.integers(0, 2**64 - 1), max_size=50))
@settings(deadline=None)
def test_members_are_those_of_a_set(keys, others):
    keys = np.unique(np.array(keys, np.uint64))
    values = np.concatenate([np.array(others, np.uint64), keys[::2], keys[::3]])
    places, found = members(values, keys, bitmap(keys))
    wanted = [i for i, v in enumerate(values.tolist()) if v in set(keys.tolist())]
    assert places.tolist() == wanted and keys[found].tolist() == values[wanted].tolist()


def test_many_members_and_many_strangers():
    keys = np.unique(np.random.default_rng(0).integers(0, 2**63, 20_000).astype(np.uint64))
    values = np.concatenate([keys, keys + np.uint64(1)])
    places, _ = members(values, keys, bitmap(keys))
    assert np.array_equal(places, np.nonzero(np.isin(values, keys))[0])
