"""Train one stage without Ray: `python -m trainer CONFIG --stage NAME [--check|--evaluate]`, also under torchrun."""

import os

# Set before torch starts its threads: waiting threads then sleep. Spinning ones are many times slower where the
# trainer shares its cores with the packer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dataprep.storage import UserError, expand, join, read_bytes
from mixer.batches import BatchSizes
from trainer.config import TrainConfig
from trainer.cost import memory_needed
from trainer.loop import evaluate_newest, train
from trainer.model import parameter_counts
from trainer.parallel import fsdp_ranks
from trainer.schedule import phase_ends
from trainer.signals import Stopped
from trainer.stages import HELD_OUT, finished, local_root, open_log, run_directory, shards_root


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the pipeline's configuration (its section `train`)")
    parser.add_argument("--stage", required=True, help="the stage to train; the one before it must be trained")
    parser.add_argument("--root", help="directory of the outputs, if not the configuration's `root`")
    parser.add_argument("--check", action="store_true", help="say what would be trained, and stop")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the stage's newest checkpoint")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except Stopped as stopped:  # as asked: no failure
        print(stopped)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run(arguments: argparse.Namespace) -> None:
    config, root, contexts = load(arguments.config, arguments.root)
    stages = stages_up_to(arguments.stage, config, root, contexts)
    directory = run_directory(config, root, stages)
    if arguments.check:
        check(config, root, stages, directory)
    elif arguments.evaluate:
        print(json.dumps(evaluate_newest(config, root, arguments.stage), indent=1))
    else:
        untrained = [stage for stage in stages[:-1] if finished(directory / stage) is None]
        if untrained:
            raise UserError(f"stage {arguments.stage} starts from stage {untrained[0]}; train that first")
        train(config, root, stages)


def load(path: str, root: str | None) -> tuple[TrainConfig, str, dict[str, Any]]:
    """The section `train`, the root, and the contexts of `mix.stages` by name ({} where a preset gives them)."""
    try:
        values = yaml.safe_load(read_bytes(path))
        root = local_root(root or values["root"])
        contexts = {stage["name"]: stage.get("context") for stage in values.get("mix", {}).get("stages", [])}
        return TrainConfig(**values["train"]), root, contexts
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} must be YAML with `root` and the sections `mix` and `train`") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("train", *first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}, not {first['input']!r}") from None


def stages_up_to(stage: str, config: TrainConfig, root: str, contexts: dict[str, Any]) -> list[str]:
    """The stages to train, in order: those of the configuration, else those packed for the same plan as `stage`."""
    names = list(contexts)
    if not names:
        files = expand(join(shards_root(config, root), "latest", "pack-*.json"))
        packed = (open_log(config, root, Path(file).stem.removeprefix("pack-")).stage for file in files)
        infos = sorted(packed, key=lambda info: info.index)
        plan = open_log(config, root, stage).stage.plan
        names = [info.stage for info in infos if info.plan == plan and info.stage != HELD_OUT]
    if stage not in names:
        raise UserError(f"the configuration has no stage {stage}; it has {', '.join(names)}")
    if unknown := sorted(set(config.stages) - set(names)):
        raise UserError(f"train.stages names {', '.join(unknown)}; the configuration has {', '.join(names)}")
    stages = names[: names.index(stage) + 1]
    for name in stages:
        there, asked = open_log(config, root, name).stage.context, contexts.get(name)
        if asked not in (None, there):
            raise UserError(f"stage {name} was packed at context {there}, but mix.stages says {asked}; run jobs/mix.py")
    return stages


def check(config: TrainConfig, root: str, stages: list[str], directory: Path) -> None:
    """Say what the last of the stages would be: parameters, memory, steps, where batch and learning rate change."""
    *before, info = (open_log(config, root, stage).stage for stage in stages)
    schedule = config.stages.get(info.stage, config.schedule)
    total, active = parameter_counts(config.model, info.vocab_size)
    print(f"model: {total / 1e6:,.2f} M parameters, {active / 1e6:,.2f} M of the layers' used per token")
    ranks = int(os.environ.get("WORLD_SIZE", config.workers))
    needed = memory_needed(config, info.vocab_size, info.context, total, fsdp_ranks(config, ranks))
    parts = ", ".join(f"{name} {gigabytes:,.2f}" for name, gigabytes in needed.items())
    print(f"memory: about {sum(needed.values()):,.2f} GB on each of {ranks} workers ({parts})")
    begins = sum(stage.tokens for stage in before)
    sizes = BatchSizes(info.context, config.batch_tokens, config.batch_marks, begins)
    steps = sum(1 for _ in sizes.steps(-(-info.tokens // info.context)))
    about = f"{info.tokens:,} tokens at context {info.context:,}, RoPE base {info.rope_base:,.0f}"
    print(f"stage {info.stage}: {about}; about {steps:,} steps")
    for mark in [0, *sorted(m - begins for m in config.batch_marks if begins < m < begins + info.tokens)]:
        n = sizes.at(-(-mark // info.context))
        print(f"  batch: {n:,} sequences ({n * info.context:,} tokens) from {mark:,} tokens on")
    for phase, end in zip(schedule, phase_ends(schedule, info.tokens), strict=True):
        print(f"  learning rate: {phase.shape} to {phase.lr:g} at {end:,.0f} tokens")
    output = directory / info.stage
    print(f"output: {output}{' (trained already)' if finished(output) else ''}")


if __name__ == "__main__":
    main()
