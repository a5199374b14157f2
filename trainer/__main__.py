"""Train one stage without Ray: `python -m trainer CONFIG --stage NAME [--root DIR] [--check]`, also under torchrun."""

import os

# Set before torch starts its threads: waiting threads then sleep. Spinning ones are many times slower where the
# trainer shares its cores with the packer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from pathlib import Path

import yaml
from pydantic import ValidationError

from dataprep.storage import UserError, expand, join, read_bytes, read_json
from mixer.reader import ShardLog
from trainer.config import TrainConfig
from trainer.loop import DONE, HELD_OUT, open_log, run_directory, train
from trainer.model import parameter_counts


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("config", metavar="CONFIG.yaml", help="the pipeline's configuration (its section `train`)")
    parser.add_argument("--stage", required=True, help="the stage to train; the one before it must be trained")
    parser.add_argument("--root", help="directory of the outputs, if not the configuration's `root`")
    parser.add_argument("--check", action="store_true", help="say what would be trained, and stop")
    arguments = parser.parse_args()
    try:
        config, root = load(arguments.config, arguments.root)
        stages = stages_up_to(root, arguments.stage)
        directory = run_directory(config, root, open_log(root, arguments.stage).stage.plan)
        if arguments.check:
            check(config, root, arguments.stage, directory)
            return
        untrained = [s for s in stages[:-1] if not (directory / s / DONE).exists()]
        if untrained:
            raise UserError(f"stage {arguments.stage} starts from stage {untrained[0]}; train that first")
        train(config, root, stages)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def load(path: str, root: str | None) -> tuple[TrainConfig, str]:
    try:
        values = yaml.safe_load(read_bytes(path))
        root = root or values["root"]
        return TrainConfig(**values.get("train", {})), str(Path(root).expanduser().absolute())
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}") from None
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} must be YAML with `root` and a section `train`") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in ("train", *first["loc"]))
        raise UserError(f"{path}: {key}: {first['msg']}, not {first['input']!r}") from None


def stages_up_to(root: str, stage: str) -> list[str]:
    """The packed stages in training order, `stage` the last."""
    logs = [ShardLog(join(root, read_json(path)["directory"])) for path in expand(join(root, "latest", "pack-*.json"))]
    names = [log.stage.stage for log in sorted(logs, key=lambda log: log.stage.index) if log.stage.stage != HELD_OUT]
    if stage not in names:
        raise UserError(f"{root} holds no shards of stage {stage}; it has {', '.join(names) or 'none'}")
    return names[: names.index(stage) + 1]


def check(config: TrainConfig, root: str, stage: str, directory: Path) -> None:
    info = open_log(root, stage).stage
    total, active = parameter_counts(config.model, info.vocab_size)
    sequences = max(1, config.batch_tokens // info.context)
    steps = -(-info.tokens // (sequences * info.context))
    print(f"model: {total / 1e6:,.2f} M parameters, {active / 1e6:,.2f} M of the layers' used per token")
    print(f"stage {stage}: {info.tokens:,} tokens at context {info.context:,}, about {steps:,} steps")
    print(f"output: {directory / stage}{' (trained already)' if (directory / stage / DONE).exists() else ''}")


if __name__ == "__main__":
    main()
