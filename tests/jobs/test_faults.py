"""Damage and odd input: nothing damaged gets into the shards, everything damaged is named or made again."""

import argparse
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from dataprep.storage import UserError
from jobs import cli, corpus, dedup, export, mix, pipeline, report, shards
from jobs.config import load
from jobs.engine import DryRunEnd, Engine
from tests.jobs import small, toy
from tests.jobs.test_data_jobs import CHECKOUT, command, copy, done, run, settings  # noqa: F401 (fixtures)
from tests.tree import commits, tree


def flip(file: Path, place: float) -> None:
    """Change one byte of a file."""
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 0x10
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("step", "place"),
    [
        *itertools.product(["tokens-*/*.arrow", "corpus-*/*.parquet"], [0.1, 0.35, 0.5, 0.65, 0.9]),
        ("plan-*/all.plan.*.json", 0.5),
        ("plan-*/all.places.*.arrow", 0.5),
        ("tokenizer-*/all.tokenizer.*.json", 0.5),
    ],
)
def test_a_flipped_byte_is_named_not_packed(done, copy, step, place):  # noqa: F811
    before = tree(copy / "root")
    victim = sorted((copy / "root").glob(step))[0]
    flip(victim, place)
    for pattern in ("pack-*", "inventory-*", "quality-*"):
        for directory in (copy / "root").glob(pattern):
            shutil.rmtree(directory)
    with pytest.raises(UserError, match=f"{victim.name} is damaged"):
        run(copy, **settings(done))
    victim.unlink()
    run(copy, **settings(done))
    assert tree(copy / "root") == before


@pytest.mark.parametrize("content", ["", "[]", '{"key": "x"}', '{"key'])
def test_a_damaged_json_file_is_made_again(done, copy, content):  # noqa: F811
    before = tree(copy / "root")
    patterns = ("tokens-*/*.commit.json", "pack-base-*/end.json", "pack-base-*/stage.json", "latest/plan.json")
    for pattern in patterns:
        next((copy / "root").glob(pattern)).write_text(content)
    next((copy / "root").glob("quality-*")).joinpath("stranger.commit.json").write_text(content)
    run(copy, **settings(done))
    assert tree(copy / "root") == before


@pytest.mark.parametrize("content", ["[]", "3", "{}", '{"directory": 3}'])
def test_published_json_of_another_shape_is_one_line(done, copy, capfd, content):  # noqa: F811
    config, root = small.write_config(copy, **settings(done)), copy / "root"
    (end,) = root.glob("pack-base-*/end.json")
    for file, job in ((root / "latest" / "pack-base.json", shards), (root / "latest" / "quality.json", report),
                      (end, shards), (end, report)):  # fmt: skip
        whole = file.read_bytes()
        file.write_text(content)
        assert cli.main(job, [config]) == 1
        said = capfd.readouterr().err
        assert f"{file.name} is damaged: it has no " in said and "Traceback" not in said
        file.write_bytes(whole)


def test_a_manifest_that_lost_lines_is_refused(done, copy):  # noqa: F811
    manifest = copy / "root" / "manifest.jsonl"
    whole, before = manifest.read_bytes(), tree(copy / "root")
    lines = whole.splitlines(keepends=True)
    for content in (b"", b"".join(lines[:-1]), b"".join(lines[1:]), whole.replace(b"01.jsonl", b"02.jsonl")):
        manifest.write_bytes(content)
        with pytest.raises(UserError, match=rf"manifest.jsonl has {len(content.splitlines())} lines, not all of the 3"):
            run(copy, corpus, **settings(done))
        manifest.unlink()
        with pytest.raises(UserError, match="has 0 lines"):
            run(copy, corpus, **settings(done))
        manifest.write_bytes(whole)
    assert tree(copy / "root") == before
    (copy / "root" / "manifest.check.json").unlink()  # as a kill right after the manifest leaves it
    run(copy, corpus, **settings(done))
    assert tree(copy / "root") == before


def test_a_dry_run_writes_nothing_whatever_is_missing(done, copy):  # noqa: F811
    config = load(small.write_config(copy, **settings(done)))
    for pattern in ("pack-base-*/end.json", "pack-longer-*/*.arrow"):
        for file in (copy / "root").glob(pattern):
            file.unlink()
    before = tree(copy / "root")
    with Engine(config.root, 0, dry_run=True) as engine, pytest.raises(DryRunEnd):
        mix.pack_all(engine, mix.prepare(engine, config))
    assert tree(copy / "root") == before
    for pointer in (copy / "root" / "latest").glob("pack-*.json"):  # planned, nothing packed yet
        pointer.unlink()
    before = tree(copy / "root")
    with Engine(config.root, 0, dry_run=True) as engine, pytest.raises(DryRunEnd):
        pipeline.main(engine, config, argparse.Namespace())
    assert tree(copy / "root") == before


def test_a_corpus_without_a_document_is_one_message(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.jsonl").write_text("{bad\n")
    run(tmp_path, corpus)
    for job in (dedup, mix, export):
        with pytest.raises(UserError, match="no documents; 1 records are in quarantine"):
            run(tmp_path, job)


def test_sigterm_ends_a_run_on_ray_with_one_line(done, tmp_path):  # noqa: F811
    job = subprocess.Popen(command(done, tmp_path / "root", "mix", 2), cwd=CHECKOUT, stderr=subprocess.PIPE, text=True)
    while job.poll() is None and commits(tmp_path / "root") < 5:
        time.sleep(0.02)
    job.terminate()
    said = job.communicate()[1]
    assert job.returncode == 130 and "SIGTERM" not in said and "Traceback" not in said
    assert said.endswith("stopped; the same command goes on from here\n")


def test_nothing_held_out(tmp_path):
    small.write_corpus(tmp_path / "in", files=1)
    run(tmp_path, mix={"held_out": {"fraction": 0}, "stages": [{"name": "base", "context": 128, "tokens": 5000}]})
    (end,) = (tmp_path / "root").glob("pack-held-out-*/end.json")
    assert json.loads(end.read_text())["totals"]["packed"] == 0


def test_a_kill_between_the_last_range_and_the_end_leaves_no_slices(tmp_path, monkeypatch):
    with Engine(str(tmp_path), 0) as engine:
        monkeypatch.setattr("jobs.engine.storage.remove", lambda path: None)
        toy.toy(engine)
        monkeypatch.undo()
    assert list(tmp_path.glob("*/slices"))
    with Engine(str(tmp_path), 0) as engine:
        toy.toy(engine)
    assert not list(tmp_path.glob("*/slices"))


def test_many_partitions_of_one_file_stay_in_document_order(tmp_path):
    (tmp_path / "in").mkdir()
    lines = [json.dumps({"text": f"document number {i} of many short ones, this one here"}) for i in range(1100)]
    (tmp_path / "in" / "x.jsonl").write_text("\n".join(lines))
    config = load(small.write_config(tmp_path, corpus={**small.config(tmp_path)["corpus"], "partition_mb": 0.00001}))
    with Engine(config.root, 0) as engine:
        partitions = corpus.partitions(engine, config)
        assert len(partitions) > 1000
        numbers = [int(Path(p.documents).name.split("-")[1].split(".")[0]) for p in partitions]
    assert numbers == sorted(numbers)


def test_outputs_inside_an_input_folder_are_refused(tmp_path):
    small.write_corpus(tmp_path / "in", files=1, documents=5)
    sections = {"corpus": {"sources": [{"name": "t", "paths": [str(tmp_path)], "include": ["*.jsonl"]}]}}
    run(tmp_path, corpus, **sections)
    with pytest.raises(UserError, match="lies in the outputs' root"):
        run(tmp_path, corpus, corpus={"sources": [{"name": "t", "paths": [str(tmp_path)], "include": ["*.jsonl*"]}]})
