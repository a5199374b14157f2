"""Train one stage without Ray: `python -m trainer CONFIG --stage NAME [--check|--evaluate]`, also under torchrun."""

import os

# Set before torch starts its threads: waiting threads then sleep. Spinning ones are many times slower where the
# trainer shares its cores with the packer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import itertools
import json
import sys
from pathlib import Path

import yaml
from pydantic import ValidationError

from dataprep.storage import UserError, expand, explain_os_error, join, read_bytes
from mixer.batches import BatchSizes
from trainer.config import TrainConfig
from trainer.cost import memory_needed
from trainer.loop import HELD_OUT, evaluate_newest, finished, local_root, open_log, run_directory, train
from trainer.model import parameter_counts
from trainer.schedule import phase_ends
from trainer.signals import Stopped


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the pipeline's configuration (its section `train`)")
    parser.add_argument("--stage", required=True, help="the stage to train; the one before it must be trained")
    parser.add_argument("--root", help="directory of the outputs, if not the configuration's `root`")
    parser.add_argument("--check", action="store_true", help="say what would be trained, and stop")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the stage's newest checkpoint")
    arguments = parser.parse_args()
    try:
        config, root, names = load(arguments.config, arguments.root)
        stages = stages_up_to(arguments.stage, names or packed_with(root, arguments.stage))
        directory = run_directory(config, root, stages)
        if arguments.check:
            check(config, root, arguments.stage, directory)
            return
        if arguments.evaluate:
            print(json.dumps(evaluate_newest(config, root, arguments.stage), indent=1))
            return
        untrained = [s for s in stages[:-1] if finished(directory / s) is None]
        if untrained:
            raise UserError(f"stage {arguments.stage} starts from stage {untrained[0]}; train that first")
        train(config, root, stages)
    except Stopped as stopped:  # as asked: no failure
        print(stopped)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def load(path: str, root: str | None) -> tuple[TrainConfig, str, list[str]]:
    """The section `train`, the root, and the names of `mix.stages` (none where a preset gives them)."""
    try:
        values = yaml.safe_load(read_bytes(path))
        root = local_root(root or values["root"])
        names = [stage["name"] for stage in values.get("mix", {}).get("stages", [])]
        return TrainConfig(**values.get("train", {})), root, names
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}") from None
    except OSError as error:
        raise explain_os_error(error) or UserError(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} must be YAML with `root` and the sections `mix` and `train`") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("train", *first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}, not {first['input']!r}") from None


def packed_with(root: str, stage: str) -> list[str]:
    """The stages that were packed for the same plan as this one, in training order."""
    plan = open_log(root, stage).stage.plan
    stages = [path.rsplit("/pack-", 1)[1].removesuffix(".json") for path in expand(join(root, "latest", "pack-*.json"))]
    infos = sorted((open_log(root, name).stage for name in stages), key=lambda info: info.index)
    return [info.stage for info in infos if info.plan == plan and info.stage != HELD_OUT]


def stages_up_to(stage: str, names: list[str]) -> list[str]:
    if stage not in names:
        raise UserError(f"the configuration has no stage {stage}; it has {', '.join(names)}")
    return names[: names.index(stage) + 1]


def check(config: TrainConfig, root: str, stage: str, directory: Path) -> None:
    """Say what would be trained: parameters, memory, steps, where batch and learning rate change, where it goes."""
    info = open_log(root, stage).stage
    schedule, planned = config.stages.get(stage, config.schedule), max(1, info.tokens)
    ends = phase_ends(schedule, planned)
    total, active = parameter_counts(config.model, info.vocab_size)
    print(f"model: {total / 1e6:,.2f} M parameters, {active / 1e6:,.2f} M of the layers' used per token")
    ranks = int(os.environ.get("WORLD_SIZE", config.workers))
    needed = memory_needed(config, info.vocab_size, info.context, total, ranks // config.parallel.dp_replicate)
    parts = ", ".join(f"{name} {gigabytes:,.2f}" for name, gigabytes in needed.items())
    print(f"memory: about {sum(needed.values()):,.2f} GB on each of {ranks} workers ({parts})")
    marks = [0, *sorted(mark for mark in config.batch_marks if mark < info.tokens)]
    batches = BatchSizes(info.context, config.batch_tokens, config.batch_marks)
    sizes = [batches.at(-(-mark // info.context)) for mark in marks]
    spans = [b - a for a, b in itertools.pairwise([*marks, info.tokens])]
    steps = sum(-(-span // (n * info.context)) for span, n in zip(spans, sizes, strict=True))
    print(f"stage {stage}: {info.tokens:,} tokens at context {info.context:,}, RoPE base {info.rope_base:,.0f}; "
          f"about {steps:,} steps")  # fmt: skip
    for mark, n in zip(marks, sizes, strict=True):
        print(f"  batch: {n:,} sequences ({n * info.context:,} tokens) from {mark:,} tokens on")
    for phase, end in zip(schedule, ends, strict=True):
        print(f"  learning rate: {phase.shape} to {phase.lr:g} at {end:,.0f} tokens")
    print(f"output: {directory / stage}{' (trained already)' if finished(directory / stage) else ''}")


if __name__ == "__main__":
    main()
