"""The pipeline: raw text to an exported model, training beside packing, on one CPU and on two, after kills."""

import argparse
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dataprep.storage import UserError
from jobs import mix, pipeline
from jobs.config import load
from jobs.engine import Engine
from tests.jobs import small
from tests.jobs.test_data_jobs import CHECKOUT, command, finish
from tests.tree import tree


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A corpus and the pipeline run over it with two CPUs."""
    folder = tmp_path_factory.mktemp("pipeline")
    small.write_corpus(folder / "in")
    small.write_quality_files(folder)
    finish(command(folder, folder / "root", "pipeline", 2))
    return folder


def losses(root: Path) -> list[tuple]:
    """(stage, step, loss, loss by source) of every step, in order."""
    records = []
    for stage in ("base", "longer"):
        (file,) = root.glob(f"train-*/{stage}/metrics.jsonl")
        records += [json.loads(line) for line in file.read_text().splitlines()]
    return [(r["stage"], r["step"], r["tokens"], r["loss"], r["sources"]) for r in records]


def data(root: Path) -> dict[str, str]:
    return {
        name: digest
        for name, digest in tree(root).items()
        if not name.startswith(("train-", "ray-", "summary", "report"))
    }


def test_the_summary_tells_the_whole_story(done):
    summary = json.loads((done / "root" / "summary.json").read_text())
    assert summary["documents"] == {"in": 192, "quarantined": 6, "kept": 180, "exact": 3, "near": 3}
    held_out, base, longer = summary["stages"]
    assert (base["stage"], longer["stage"], held_out["stage"]) == ("base", "longer", "held-out")
    assert base["first_loss"] > base["last_loss"] and longer["first_loss"] < base["first_loss"] - 0.5
    assert longer["held_out_loss"] < summary["held_out_unigram_entropy"] + 1
    for stage in (base, longer):
        assert stage["tokens_per_second"] > 0 and 0 <= stage["padding"] < 0.5
        assert sum(stage["shares_achieved"].values()) == pytest.approx(1)
        assert Path(stage["shards"]).is_dir()
    assert (Path(summary["model"]) / "config.json").exists()
    assert "The largest clusters" in (done / "root" / "report.html").read_text()


def test_the_exported_model_loads_in_transformers(done):
    from transformers import AutoModelForCausalLM

    summary = json.loads((done / "root" / "summary.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(summary["model"])
    assert type(model).__name__ == "MiniMaxForCausalLM"


def test_one_cpu_gives_the_same_bytes_and_losses(done, tmp_path):
    finish(command(done, tmp_path / "root", "pipeline", 1))
    assert data(tmp_path / "root") == data(done / "root")
    assert losses(tmp_path / "root") == losses(done / "root")


def test_a_second_run_finds_everything_done(done):
    made_anew = ("summary.json", "report.html")
    files = [f for f in (done / "root").rglob("*") if f.is_file() and f.name not in made_anew]
    before = {f: f.stat().st_mtime_ns for f in files}
    began = time.monotonic()
    finish(command(done, done / "root", "pipeline", 2))
    assert time.monotonic() - began < 60
    assert before == {f: f.stat().st_mtime_ns for f in before if f.exists()}
    there = tree(done / "root")
    finish([*command(done, done / "root", "pipeline", 2), "--dry-run"])
    assert tree(done / "root") == there


def test_a_kill_in_mid_training_changes_no_loss(done, tmp_path):
    root = tmp_path / "root"
    arguments = [*command(done, root, "pipeline", 2), "--train.checkpoint_steps", "3"]
    run = subprocess.Popen(
        arguments, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while run.poll() is None and not list(root.glob("train-*/longer/metrics.jsonl")):
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    finish(arguments)
    assert losses(root) == losses(done / "root") and data(root) == data(done / "root")


def test_a_packer_that_dies_is_an_error_not_an_endless_wait(tmp_path, monkeypatch):
    small.write_corpus(tmp_path / "in", files=2)

    def broken(out, drawn, window, info, policy, seed, write=mix.write_window):
        if info.stage == "longer":
            raise UserError("the packer fell over")
        return write(out, drawn, window, info, policy, seed)

    monkeypatch.setattr(mix, "write_window", broken)
    config = load(small.write_config(tmp_path))
    with Engine(config.root, 0) as engine, pytest.raises(UserError, match="fell over"):
        pipeline.main(engine, config, argparse.Namespace(command_line="CONFIG.yaml"))
    assert not (tmp_path / "root" / "summary.json").exists()
    monkeypatch.undo()
    with Engine(config.root, 0) as engine:
        pipeline.main(engine, config, argparse.Namespace(command_line="CONFIG.yaml"))
    assert (tmp_path / "root" / "summary.json").exists()
