"""Where the stages' shards are, where they are trained, and which are finished: all that needs no torch."""

from pathlib import Path
from typing import Any

from dataprep.storage import UserError, absolute, is_local, join, latest, read_json
from mixer.cache import ShardCache
from mixer.reader import ShardLog
from trainer.config import TrainConfig

HELD_OUT = "held-out"
DONE = "done.json"
CACHE_BYTES = 16 << 30  # on the disk under `root`, of shards from elsewhere: some dozens of them


def local_root(root: str) -> str:
    """The root as an absolute path, `~` and `file://` resolved. Raises UserError for any other URL."""
    if not is_local(root):
        raise UserError(
            f"root is {root}: checkpoints need a file system that all workers share; give a local path, "
            f"and say where the shards are with train.shards: {root}"
        )
    return absolute(root)


def shards_root(config: TrainConfig, root: str) -> str:
    return absolute(config.shards or root)


def open_log(config: TrainConfig, root: str, stage: str) -> ShardLog:
    """The shards of a stage, by the name they were published under in `latest/`."""
    shards = shards_root(config, root)
    directory = latest(shards, f"pack-{stage}")
    if directory is None:
        raise UserError(f"{shards} holds no shards of stage {stage}; plan and pack it first (jobs/mix.py)")
    cache = ShardCache(join(root, "shard-cache"), CACHE_BYTES)
    return ShardLog(directory, config.quarantined, cache)


def run_directory(config: TrainConfig, root: str, stages: list[str]) -> Path:
    """Where these stages are trained. Raises UserError where they were not all packed for one plan."""
    plan, *others = (open_log(config, root, stage).stage.plan for stage in stages)
    for stage, other in zip(stages[1:], others, strict=True):
        if other != plan:
            raise UserError(f"stage {stage} was packed for another plan than stage {stages[0]}; run jobs/mix.py")
    return Path(root) / f"train-{config.identity(plan)}"


def finished(directory: Path) -> dict[str, Any] | None:
    """What a stage's done.json says; None where the stage must be trained (again): there is none, it is damaged, or
    its checkpoint is gone."""
    try:
        done = read_json(str(directory / DONE), checkpoint=str, steps=int, tokens=int, stage_steps=int)
    except UserError:
        return None
    return done if done and (directory / done["checkpoint"] / "checkpoint.json").is_file() else None
