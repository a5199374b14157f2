"""What is lost, spoilt or full on the way: each gives one line, or the run mends it and ends the same."""

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from dataprep.storage import UserError
from mixer.shards import write_end
from tests.trainer.shards import VOCABULARY
from tests.trainer.training import CONFIG, STAGES, records, weights, without_speed
from trainer import checkpoint, loop, metrics, parallel
from trainer.loop import train


def test_one_run_at_a_time(trained, root, monkeypatch):
    monkeypatch.setattr(parallel, "LOCK_SECONDS", 0.0)
    directory = root / Path(trained[1]["directory"]).name
    directory.mkdir()
    with open(directory / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"another run is training at {directory}"):
            train(CONFIG, str(root), ["base"])
    assert not list(directory.glob("base"))


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the trained root, and the run's directory in it."""
    root = shutil.copytree(trained[0], tmp_path / "copy")
    return root, root / Path(trained[1]["directory"]).name


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "tensors": lambda c: truncate(next(c.glob("*.distcp"))),
    "no tensors": lambda c: next(c.glob("*.distcp")).unlink(),
    "metadata": lambda c: truncate(c / ".metadata"),
    "info": lambda c: truncate(c / "checkpoint.json"),
    "no info": lambda c: (c / "checkpoint.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(trained, copy, damage, capfd):
    root, directory = copy
    newest = checkpoint.checkpoints(directory / "longer")[-1]
    DAMAGE[damage](newest)
    (directory / "longer" / loop.DONE).unlink()
    assert train(CONFIG, str(root), STAGES)["stages"].keys() == trained[1]["stages"].keys()
    said = capfd.readouterr()
    assert f"checkpoint {newest} is damaged" in said.out and "Traceback" not in said.err
    assert without_speed(records(root, "longer")) == without_speed(records(trained[0], "longer"))
    mine, theirs = weights(root, "longer"), weights(trained[0], "longer")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_other_shapes(copy):
    _, directory = copy
    newest = checkpoint.checkpoints(directory / "longer")[-1]
    config = CONFIG.model_copy(update={"model": CONFIG.model.model_copy(update={"ffn": 12})})
    with parallel.world(config) as ranks:
        model = parallel.build_model(config, VOCABULARY, 1e4, ranks)
        said = rf"{newest} has layers.0.mlp.experts.gate_up_proj as \(4, 2, 24, 32\), this model \(4, 2, 12, 32\)"
        with pytest.raises(UserError, match=said):
            checkpoint.load(newest, model, parallel.build_optimizer(config, model))


def test_where_no_checkpoint_is_whole(copy):
    root, directory = copy
    both = checkpoint.checkpoints(directory / "longer")
    for path in both:
        truncate(path / "checkpoint.json")
    (directory / "longer" / loop.DONE).unlink()
    with pytest.raises(UserError, match=f"checkpoint {both[1]}, {both[0]} is damaged; remove it"):
        train(CONFIG, str(root), STAGES)


def test_what_is_beyond_the_damage_makes_no_room(copy):
    """A damaged checkpoint of a later step must not count among those to keep."""
    root, directory = copy
    newest = checkpoint.checkpoints(directory / "longer")[-1]
    truncate(newest / "checkpoint.json")
    newest = newest.rename(newest.with_name("step-00000099"))
    (directory / "longer" / loop.DONE).unlink()
    config = CONFIG.model_copy(update={"keep": 1})
    done = train(config, str(root), STAGES)["stages"]["longer"]
    assert [c.name for c in checkpoint.checkpoints(directory / "longer")] == [done["checkpoint"]]


@pytest.mark.parametrize("lost", ["checkpoint", "done.json", "its steps"])
def test_a_stage_without_its_end_is_not_done(trained, copy, call, lost):
    root, directory = copy
    stage = directory / "base"
    if lost == "checkpoint":
        for path in checkpoint.checkpoints(stage):
            shutil.rmtree(path)
    elif lost == "its steps":
        checkpoints = [path.name for path in checkpoint.checkpoints(stage)]
        (stage / loop.DONE).write_text(json.dumps({"checkpoint": checkpoints[-1]}))
    else:
        truncate(stage / loop.DONE)
    assert loop.finished(stage) is None
    code, said = call("--stage", "longer", "--root", str(root))
    assert code == 1 and "train that first" in said.err
    again = train(CONFIG, str(root), ["base"])["stages"]["base"]
    expected = trained[1]["stages"]["base"]
    assert {**again, "tokens_per_second": 0} == {**expected, "tokens_per_second": 0}


def test_spoilt_and_missing_metrics(copy):
    root, directory = copy
    path = directory / "base" / "metrics.jsonl"
    whole = metrics.read(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], b"\xff\x00garbage\n", b"7\n", *lines[1:-1], lines[-1][:-9]]))
    assert metrics.read(path) == whole[:-1]
    path.unlink()
    (directory / "base" / loop.DONE).unlink()
    done = train(CONFIG, str(root), ["base"])["stages"]["base"]
    assert done["first_loss"] is done["last_loss"] is done["tokens_per_second"] is None


def test_a_stage_without_steps(root):
    write_end(str(root / "pack-base"), [], {})
    done = train(CONFIG, str(root), STAGES)["stages"]
    assert (done["base"]["steps"], done["base"]["first_loss"], done["base"]["checkpoint"]) == (0, None, "step-00000000")
    assert done["longer"]["steps"] > 0


class FullDisk:
    """Takes a little, then no more; torch's zip writer turns the second such error into one of its own."""

    def __init__(self, file, limit):
        self.file, self.left = file, limit

    def write(self, data):
        self.left -= len(memoryview(data).cast("B"))
        if self.left < 0:
            raise OSError(28, "No space left on device")
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("limit", [0, 3000])
def test_a_full_disk(trained, root, limit, monkeypatch):
    from torch.distributed.checkpoint.filesystem import FileSystem

    real = FileSystem.create_stream

    @contextlib.contextmanager
    def full(self, path, mode):
        with real(self, path, mode) as file:
            yield FullDisk(file, limit) if mode == "wb" else file

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"no space left while writing .*/train-"),
    ):
        patch.setattr(FileSystem, "create_stream", full)
        train(CONFIG, str(root), ["base"])
    (directory,) = root.glob("train-*")
    assert not [p for p in (directory / "base").iterdir() if "step-" in p.name]
    train(CONFIG, str(root), ["base"])
    assert without_speed(records(root, "base")) == without_speed(records(trained[0], "base"))
