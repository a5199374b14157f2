"""Train job: runs the stages in one Ray Train run; a worker that dies is replaced and goes on from the last checkpoint."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import os
from typing import Any

from dataprep.storage import UserError, join
from trainer.config import TrainConfig

MAX_FAILURES = 5
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
            num_workers=config.workers,
            use_gpu=gpu,
            resources_per_worker=resources | ({"GPU": 1} if gpu else {}),
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
