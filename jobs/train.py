"""Train job: runs the stages in one Ray Train run; a worker that dies is replaced, from the last checkpoint."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dataprep import storage
from dataprep.storage import UserError, join
from jobs import mix
from jobs.config import Config
from jobs.engine import DryRunEnd, Engine
from jobs.progress import say
from mixer.shards import StageInfo
from trainer.config import TrainConfig
from trainer.stages import finished as stage_finished

MAX_FAILURES = 5
LINE_SECONDS = 10.0
ENVIRONMENT = {
    # Waiting torch threads sleep: spinning ones are many times slower where the packer runs on the same cores.
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Ray Train would say every line twice
}


def train(config: TrainConfig, root: str, stages: list[str], ray: bool = True) -> dict[str, Any]:
    """Train the stages in this order; `root` is absolute. Returns what `trainer.loop.train` returns.

    The workers ask Ray for no CPU unless `train.cpus_per_worker` says so: they run beside the packing tasks, which may
    hold all there are. Raises UserError for the user's mistakes, which are not tried again.
    """
    if not ray:
        from trainer.loop import train as train_here

        return train_here(config, root, stages)

    os.environ.update(ENVIRONMENT)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray places no worker that asks for nothing at all: without a CPU, it asks for one byte of memory.
    resources: dict[str, float] = {"CPU": config.cpus_per_worker} if config.cpus_per_worker else {"CPU": 0, "memory": 1}
    gpu = config.device == "cuda"
    trainer = TorchTrainer(
        worker,
        train_loop_config={"config": config.model_dump(mode="json"), "root": root, "stages": stages},
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=gpu, resources_per_worker=resources | ({"GPU": 1} if gpu else {})
        ),
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpu else "gloo", timeout_s=6 * 3600),
        run_config=RunConfig(
            storage_path=join(root, "ray-train"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            worker_runtime_env={"env_vars": ENVIRONMENT},
        ),
    )
    said = trainer.fit().return_value
    if isinstance(said, str):
        raise UserError(said)
    return said


def worker(arguments: dict[str, Any]) -> dict[str, Any] | str:
    """One rank: the result, or the message of a user's mistake (raised, it would count as a failure to try again)."""
    from trainer.loop import train as train_here

    try:
        return train_here(TrainConfig(**arguments["config"]), arguments["root"], arguments["stages"])
    except UserError as error:
        return str(error)


def build(engine: Engine, config: Config) -> dict[str, Any]:
    """Train all stages of the curriculum that are not trained yet; what `trainer.loop.train` returns."""
    stages = [stage.name for stage in config.mix.stages]
    if not storage.is_local(engine.root):
        raise UserError(
            f"root is {engine.root}: checkpoints need a file system that all workers share; give a local path"
        )
    if config.train.shards:
        raise UserError("train.shards is for `python -m trainer`; this job trains on the shards it packs: leave it out")
    if config.workers == 0 and config.train.workers > 1:
        raise UserError(
            f"workers: 0 trains in this process; set train.workers ({config.train.workers}) to 1, or workers"
        )
    found = finished(config.train, engine.root, stages)
    if found is None and engine.dry_run:
        say("train: would run")
        raise DryRunEnd("train")
    if found is None:
        if config.workers != 0:
            engine.ray()
        with following(engine.root, stages):
            return train(config.train, engine.root, stages, ray=config.workers != 0)
    return found


@contextmanager
def following(root: str, stages: list[str]) -> Iterator[None]:
    """While the block runs, say every few seconds how training goes (its workers may be anywhere)."""
    stop = threading.Event()

    def follow() -> None:
        said = None
        while not stop.wait(LINE_SECONDS):
            for stage in reversed(stages):
                try:
                    run = storage.latest(root, "train") or root
                    lines = storage.read_bytes(join(run, stage, "metrics.jsonl")).splitlines()
                    last = json.loads(lines[-1])
                except (OSError, IndexError, ValueError, UserError):  # not there yet, or in the middle of a line
                    continue
                if (stage, last["step"]) != said:
                    said = (stage, last["step"])
                    say(
                        f"train {stage}: {last['stage_tokens']:,} tokens, step {last['step']}, "
                        f"loss {last['loss'] or math.nan:.3f}, lr {last['lr']:.1e}, "
                        f"{last['tokens_per_second']:,.0f} tokens/s"
                    )
                break

    thread = threading.Thread(target=follow, name="follow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def finished(config: TrainConfig, root: str, stages: list[str]) -> dict[str, Any] | None:
    """The result, if every stage is trained on the shards that are there now; needs neither Ray nor torch."""
    packed = storage.latest(root, f"pack-{stages[0]}")
    if packed is None:
        return None
    directory = join(root, f"train-{config.identity(StageInfo.load(packed).plan)}")
    done = {stage: stage_finished(Path(directory, stage)) for stage in stages}
    export = join(directory, stages[-1], "hf") if config.export else None
    if None in done.values() or (export and not storage.exists(join(export, "config.json"))):
        return None
    return {"directory": directory, "stages": done, "export": export}


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    mix.pack_all(engine, mix.prepare(engine, config))
    result = build(engine, config)
    for stage, done in result["stages"].items():
        if done["stage_steps"]:
            speed = f"{done['tokens_per_second']:,.0f} tokens/s"
            say(f"{stage}: loss {done['first_loss']:.3f} -> {done['last_loss']:.3f}, {speed}")
        else:
            say(f"{stage}: no sequence to train on")
    say(f"train: {result['directory']}   model: {result['export']}")


if __name__ == "__main__":
    from jobs.cli import run

    run("train")
