"""The manifest: numbers are given once and kept, whatever happens to the files."""

import os
import re
import uuid

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dataprep import manifest
from dataprep.config import CorpusConfig
from dataprep.manifest import Entry, InputFile, groups, list_inputs, load, save, update
from dataprep.storage import UserError, expand, read_bytes

# States of a folder: path -> (version, bytes); two sources by the path's first letter.
states = st.lists(
    st.dictionaries(st.from_regex("[ab][0-5]", fullmatch=True), st.tuples(st.sampled_from("xyz"), st.integers(0, 150))),
    min_size=1,
    max_size=5,
)


def corpus(*sources, **values):
    return CorpusConfig.model_validate({"sources": sources, **values})


def inputs_of(state):
    return [InputFile(path[0], path, size, f"{version}{size}") for path, (version, size) in sorted(state.items())]


@settings(max_examples=200, deadline=None)
@given(states)
def test_numbers_are_stable(states):
    entries: list[Entry] = []
    for state in states:
        inputs = inputs_of(state)
        before, (entries, active) = entries, update(entries, inputs, 100)
        assert entries[: len(before)] == before  # append-only
        assert [e.file for e in entries] == list(range(len(entries)))
        assert sorted((e.source, e.path, e.version) for e in active) == sorted(
            (i.source, i.path, i.version) for i in inputs
        )
        assert not {e.group for e in before} & {e.group for e in entries[len(before) :]}  # groups never grow
        assert update(entries, inputs, 100) == (entries, active)  # nothing new, nothing done
    for members in groups(entries).values():
        assert len({e.source for e in members}) == 1
        assert len(members) == 1 or sum(e.bytes for e in members) <= 100
        assert [e.file for e in members] == sorted(e.file for e in members)
    assert sorted(groups(entries)) == list(range(len(groups(entries))))


def test_groups_are_filled_in_order():
    sizes = {"a0": 40, "a1": 60, "a2": 10, "a3": 500, "a4": 10, "b0": 10}
    entries, _ = update([], inputs_of({path: ("x", size) for path, size in sizes.items()}), 100)
    assert [e.group for e in entries] == [0, 0, 1, 2, 3, 4]


def test_change_removal_and_return(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text("{}")
    b.write_text("{}")
    config = corpus({"name": "s", "paths": [str(tmp_path)]})
    entries, active = update([], list_inputs(config), 1e6)
    assert [(e.file, e.path) for e in active] == [(0, str(a)), (1, str(b))]
    old = a.stat()
    a.write_text("[]")
    os.utime(a, ns=(0, old.st_mtime_ns + 1))  # same size, another time
    b.rename(tmp_path / "b.hidden")
    with pytest.raises(UserError, match=r"b\.hidden.*exclude"):
        list_inputs(config)
    config = corpus({"name": "s", "paths": [str(tmp_path)], "exclude": ["*.hidden"]})
    entries, active = update(entries, list_inputs(config), 1e6)
    assert [(e.file, e.group) for e in active] == [(2, 1)] and len(entries) == 3
    (tmp_path / "b.hidden").rename(b)
    os.utime(a, ns=(0, old.st_mtime_ns))
    _, active = update(entries, list_inputs(config), 1e6)
    assert [e.file for e in active] == [0, 1]


def test_numbers_run_out(monkeypatch):
    monkeypatch.setattr(manifest, "MAX_FILES", 2)
    update([], inputs_of({"a0": ("x", 1), "a1": ("x", 1)}), 100)
    with pytest.raises(UserError, match="a2"):
        update([], inputs_of({"a0": ("x", 1), "a1": ("x", 1), "a2": ("x", 1)}), 100)


def test_save_and_load(tmp_path):
    path = str(tmp_path / "manifest.jsonl")
    assert load(path) == []
    entries, _ = update([], inputs_of({"a0": ("x", 1), "bö": ("x", 1)}), 100)
    save(path, entries)
    first = read_bytes(path)
    assert load(path) == entries
    save(path, load(path))
    assert read_bytes(path) == first
    for damaged in (first[:-20], first[first.index(b"\n") + 1 :], first + b'{"file": 2}\n'):
        with open(path, "wb") as file:
            file.write(damaged)
        with pytest.raises(UserError, match="manifest"):
            load(path)


def test_directories_globs_and_links(tmp_path, monkeypatch):
    tree = tmp_path / "tree"
    for name in ("b.py", "a/x.py", "a/y.c", ".git/config", "a/.hidden", "c/z.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / "a" / "loop").symlink_to(tree)
    (tree / "linked").symlink_to(tree / "c")

    def names(*paths, **values):
        found = list_inputs(corpus({"name": "s", "kind": "tree", "paths": paths, **values}))
        return [os.path.relpath(f.path, tree) for f in found]

    everything = ["a/x.py", "a/y.c", "b.py", "c/z.py", "linked/z.py"]
    assert names(str(tree)) == names(str(tree), str(tree / "b.py")) == everything
    assert names(str(tree), include=["*.py"], exclude=["a/*", "linked/*"]) == ["b.py", "c/z.py"]
    assert names(str(tree / "*" / "*.py")) == ["a/x.py", "c/z.py", "linked/z.py"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert names("~/tree") == everything


def test_what_exists_is_no_glob(tmp_path):
    for base in (str(tmp_path), f"memory://{uuid.uuid4().hex}"):
        for name in ("a1.jsonl", "a[1].jsonl", "d1/x.jsonl", "d[1]/y.jsonl", "d[1]/.z.jsonl"):
            with fsspec.open(f"{base}/{name}", "wb", auto_mkdir=True) as file:
                file.write(b"{}")
        for path, expected in {"a[1].jsonl": "a[1].jsonl", "d[1]": "d[1]/y.jsonl", "a[0-9].jsonl": "a1.jsonl"}.items():
            (found,) = list_inputs(corpus({"name": "s", "paths": [f"{base}/{path}"]}))
            assert found.path.endswith(f"/{expected}")
            assert expand(f"{base}/{path}") == [found.path]


class Refusing(fsspec.AbstractFileSystem):
    """A file system that says no in the manner of an object store's library: with an error class of its own."""

    protocol = "refusing"

    def info(self, path, **kwargs):
        raise RuntimeError("Unable to locate credentials")

    ls = info


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("unheard-of://bucket/a.jsonl", "Protocol not known.*check the URL"),
        ("refusing://bucket/a.jsonl", "Unable to locate credentials.*check the URL, the credentials"),
        ("refusing://bucket/*.jsonl", "Unable to locate credentials.*check the URL, the credentials"),
        ("absent://bucket/a.jsonl", "install absentfs.*install"),
    ],
)
def test_refusing_file_systems_are_named(url, message):
    fsspec.register_implementation("refusing", Refusing, clobber=True)
    fsspec.register_implementation("absent", "absentfs.AbsentFS", errtxt="Please install absentfs", clobber=True)
    with pytest.raises(UserError, match=rf"'s'.*{re.escape(url)}.*{message}"):
        list_inputs(corpus({"name": "s", "paths": [url]}))


def test_what_cannot_be_listed_is_named(tmp_path):
    for paths in (["none.jsonl"], ["*.jsonl"], ["memory://none/*"]):
        with pytest.raises(UserError, match=rf"'s'.*{re.escape(paths[0])}"):
            list_inputs(corpus({"name": "s", "paths": paths}))
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"'s'.*broken\.txt"):
        list_inputs(corpus({"name": "s", "paths": [str(tmp_path)]}))
    (tmp_path / "broken.txt").unlink()
    os.mkfifo(tmp_path / "pipe.txt")  # would wait for ever
    with pytest.raises(UserError, match=r"'s'.*pipe\.txt"):
        list_inputs(corpus({"name": "s", "paths": [str(tmp_path)]}))


def test_through_fsspec():
    folder = f"memory://{uuid.uuid4().hex}"
    for name in ("b.jsonl", "a.jsonl.gz", "deep/c.parquet", ".hidden/d.jsonl"):
        with fsspec.open(f"{folder}/{name}", "wb") as file:
            file.write(name.encode())
    found = list_inputs(corpus({"name": "s", "paths": [folder]}))
    assert [f.path.rpartition("/")[2] for f in found] == ["a.jsonl.gz", "b.jsonl", "c.parquet"]
    assert all("://" in f.path for f in found) and found[1].bytes == 7
    assert list_inputs(corpus({"name": "s", "paths": [folder]})) == found
    with fsspec.open(f"{folder}/b.jsonl", "wb") as file:
        file.write(b"changed")
    again = list_inputs(corpus({"name": "s", "paths": [f"{folder}/b.*"]}))
    assert len(again) == 1 and again[0].path == found[1].path and again[0].version != found[1].version


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "at least 1"),
        ([{"name": "a", "paths": ["x"]}, {"name": "a", "paths": ["y"]}], "'a'"),
        ([{"name": "p", "kind": "python-installation"}, {"name": "p-code", "paths": ["y"]}], "'p-code'"),
        ([{"name": "a"}], "'a'.*paths"),
        ([{"name": "a b", "paths": ["x"]}], "pattern"),
        ([{"name": "a", "paths": ["x"], "kind": "tree", "max_bytes": 5}], "'a'.*max_bytes"),
        ([{"name": "p", "kind": "python-installation", "paths": ["x"]}], "'p'.*paths"),
        ([{"name": "a", "paths": ["x"], "fields": {"text": "t", "id": "t"}}], "'t'"),
        ([{"name": "a", "paths": ["x"], "knid": "text"}], "knid"),
    ],
)
def test_impossible_configurations(sources, message):
    with pytest.raises(ValidationError, match=f"(?s){message}"):
        corpus(*sources)


def test_source_of_a_label():
    config = corpus({"name": "p", "kind": "python-installation"}, {"name": "a", "paths": ["x"]})
    assert config.source("p-code").name == "p" and config.source("a").name == "a"
