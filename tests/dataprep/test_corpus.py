"""Corpus partitions: the contract's columns, the same bytes every time, nothing lost between good and bad."""

import json
import uuid
from collections import Counter

import fsspec
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dataprep.config import CorpusConfig
from dataprep.corpus import DOCUMENTS, QUARANTINE, build_group, content_hash
from dataprep.manifest import groups, list_inputs, update
from dataprep.storage import Attempt, UserError, expand, read_table


def build(paths, out, **values):
    """One group's commit from these files."""
    config = CorpusConfig.model_validate({"sources": [{"name": "s", "paths": [str(p) for p in paths]}], **values})
    _, active = update([], list_inputs(config), config.group_mb * 1e6)
    ((_, entries),) = groups(active).items()
    attempt = Attempt(str(out), "group-0", {})
    return attempt.commit(build_group(attempt, entries, config.sources[0], config))


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_columns_of_the_contract(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"text": "one\r\ntwo", "id": "x", "year": 1999}, "", "{", {"text": "é"}])
    b = write(tmp_path / "b.jsonl", ["[]", {"text": "b"}])
    commit = build([a, b], tmp_path / "out")
    assert list(commit.files) == ["documents-00000", "quarantine"]
    documents = read_table(commit.path("documents-00000"))
    assert documents.schema.equals(DOCUMENTS)
    assert documents.to_pylist() == [
        {
            "doc": doc,
            "source": "s",
            "text": text,
            "id": id,
            "origin": origin,
            "content_hash": xxhash.xxh3_128_digest(hashed),
            "meta": meta,
        }
        for doc, text, id, origin, hashed, meta in [
            (0, "one\r\ntwo", "x", f"{a}:0", b"one\ntwo", '{"year":1999}'),
            (3, "é", f"{a}:3", f"{a}:3", "é".encode(), "{}"),
            ((1 << 40) + 1, "b", f"{b}:1", f"{b}:1", b"b", "{}"),
        ]
    ]
    bad = read_table(commit.path("quarantine"))
    assert bad.schema.equals(QUARANTINE)
    assert [(r["source"], r["path"], r["record"], r["reason"]) for r in bad.to_pylist()] == [
        ("s", str(a), 2, "malformed JSON"),
        ("s", str(b), 0, "wrong type"),
    ]
    assert commit.aggregates == {
        "documents": {"s": 3},
        "bytes": {"s": 8 + 2 + 1},
        "quarantined": {"s": {"malformed JSON": 1, "wrong type": 1}},
    }


def test_partitions_and_the_same_bytes_twice(tmp_path):
    rows = [{"text": f"{i} " * 300, "id": i} if i % 50 else "broken" for i in range(2000)]
    path = write(tmp_path / "a.jsonl", rows)
    first, again = (build([path], tmp_path / name, partition_mb=0.3) for name in ("one", "two"))
    assert first == again and first.fingerprint == again.fingerprint
    names = [name for name in first.files if name != "quarantine"]
    assert names == [f"documents-{i:05}" for i in range(len(names))] and len(names) > 3
    tables = [read_table(first.path(name)) for name in names]
    assert all(290_000 < sum(map(len, t["text"].to_pylist())) < 310_000 for t in tables[:-1])
    kept = [doc for table in tables for doc in table["doc"].to_pylist()]
    quarantined = read_table(first.path("quarantine"))["record"].to_pylist()
    assert sorted(kept + quarantined) == list(range(2000)) and kept == sorted(kept)
    assert pq.ParquetFile(first.path(names[0])).metadata.row_group(0).column(2).compression == "ZSTD"


def test_all_bad_and_nothing_at_all(tmp_path):
    commit = build([write(tmp_path / "a.jsonl", ["{"] * 5)], tmp_path / "out")
    assert list(commit.files) == ["quarantine"] and commit.aggregates["documents"] == {}
    commit = build([write(tmp_path / "empty.jsonl", [])], tmp_path / "out2")
    assert commit.files == {} and commit.aggregates == {"documents": {}, "bytes": {}, "quarantined": {}}


def test_a_file_changed_after_listing(tmp_path):
    config = CorpusConfig.model_validate({"sources": [{"name": "s", "paths": [str(tmp_path / "a.txt")]}]})
    (tmp_path / "a.txt").write_text("before")
    _, active = update([], list_inputs(config), 1)
    (tmp_path / "a.txt").write_text("after that")
    with pytest.raises(UserError, match=r"a\.txt"):
        build_group(Attempt(str(tmp_path / "out"), "g", {}), active, config.sources[0], config)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt"):
        build_group(Attempt(str(tmp_path / "out"), "g", {}), active, config.sources[0], config)


def test_failure_leaves_no_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [{"text": "x" * 1000}] * 500)
    left = [b"0" * 16] * 400
    monkeypatch.setattr("dataprep.corpus.content_hash", lambda text: left.pop())
    with pytest.raises(IndexError):
        build([path], tmp_path / "out", partition_mb=0.3)
    assert not [f for f in (tmp_path / "out").iterdir() if f.name.startswith(".tmp")]


def test_through_fsspec():
    folder = f"memory://{uuid.uuid4().hex}"
    with fsspec.open(f"{folder}/in.jsonl", "wb") as file:
        file.write(b'{"text": "a"}\n')
    commit = build([f"{folder}/in.jsonl"], f"{folder}/out")
    (row,) = read_table(commit.path("documents-00000")).to_pylist()
    assert row["text"] == "a" and [row["origin"]] == [f"{path}:0" for path in expand(f"{folder}/in.jsonl")]


@given(st.text(alphabet="a\r\n "))
def test_content_hash_folds_line_ends_only(text):
    folded = "\n".join(text.replace("\r\n", "\n").split("\r"))
    assert content_hash(text.encode()) == xxhash.xxh3_128_digest(folded.encode())
    assert Counter(folded)["\r"] == 0
