"""The train job on Ray: beside a task that holds the only CPU, and through a worker's death."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dataprep.storage import UserError
from jobs.train import train
from tests.trainer.shards import write_root
from trainer.config import ModelConfig, TrainConfig
from trainer.metrics import read

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(
    model=ModelConfig(hidden=32, head_dim=16, rotary_dim=8, ffn=24, block=16), batch_tokens=240, checkpoint_steps=2,
    evaluate_tokens=480, threads=1, workers=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def one_cpu():
    """A Ray cluster whose one CPU is taken, as packing tasks take it."""
    import ray

    ray.init(num_cpus=1, runtime_env={"env_vars": {"PYTHONPATH": str(CHECKOUT)}}, log_to_driver=False)
    hog = ray.remote(num_cpus=1)(lambda: time.sleep(3600)).remote()
    yield
    ray.cancel(hog, force=True)
    ray.shutdown()


def kill_a_worker(root: Path, killed: list[int]) -> None:
    """As soon as there is a checkpoint, kill -9 the process that writes this root's metrics."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for metrics in root.glob("train-*/base/metrics.jsonl"):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if list(metrics.parent.glob("step-*")) and any(
                        f.readlink() == metrics for f in (process / "fd").iterdir()
                    ):
                        os.kill(int(process.name), signal.SIGKILL)
                        killed.append(int(process.name))
                        return
                except OSError:
                    continue
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the worker by its open files")
def test_a_killed_worker_is_replaced_and_nothing_is_lost(one_cpu, tmp_path):
    for name in ("whole", "killed"):
        write_root(tmp_path / name)
    whole = train(CONFIG.model_copy(update={"workers": 1}), str(tmp_path / "whole"), ["base"], ray=False)
    killed: list[int] = []
    end = tmp_path / "killed" / "pack-base" / "end.json"
    kept = end.read_bytes()
    end.unlink()  # the run follows the stage, so it cannot be over before it was killed

    def kill_then_end() -> None:
        kill_a_worker(tmp_path / "killed", killed)
        end.write_bytes(kept)

    killer = threading.Thread(target=kill_then_end)
    killer.start()
    result = train(CONFIG, str(tmp_path / "killed"), ["base"])
    killer.join()
    assert killed
    mine, theirs = (read(Path(r["directory"]) / "base" / "metrics.jsonl") for r in (result, whole))
    assert [r["step"] for r in mine] == [r["step"] for r in theirs] == list(range(1, len(mine) + 1))
    assert [r["tokens"] for r in mine] == [r["tokens"] for r in theirs]
    assert [r["loss"] for r in mine] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    assert Path(result["export"], "config.json").exists()


def test_a_mistake_is_told_once(one_cpu, tmp_path):
    write_root(tmp_path)
    with pytest.raises(UserError, match="holds no shards of stage typo"):
        train(CONFIG, str(tmp_path), ["typo"])
