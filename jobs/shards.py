"""Shards job: shows, verifies, counts and explains packed shards. CONFIG.yaml may also be a stage's directory."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dataprep import storage
from dataprep.storage import Commit, UserError
from jobs import cli
from jobs.config import Config
from jobs.progress import Progress, say
from mixer.batches import BatchSizes
from mixer.config import HELD_OUT
from mixer.guarantees import add_counts
from mixer.reader import ShardLog
from mixer.shards import read_end, shard_key
from mixer.verify import quarantine, verify

COMMANDS = {
    "stats": "what the stages hold, by source, tier and length class",
    "verify": "compare every batch with its checksums; quarantine.json lists the damaged ones",
    "inspect": "the text of one sequence, document by document",
    "explain": "the documents of a training step, back to file and record",
}


@dataclass(frozen=True)
class Where:
    """The stages somebody asks about. root: of all outputs. config: None where a stage's directory was given."""

    root: str
    logs: list[ShardLog]
    config: Config | None


def flags(parser: argparse.ArgumentParser) -> None:
    about = "; ".join(f"{name}: {what}" for name, what in COMMANDS.items())
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="stats", help=about)
    parser.add_argument("--stage", metavar="NAME", help="only this stage (inspect: the first)")
    parser.add_argument("--sequence", metavar="N", type=int, default=0, help="inspect: which, from 0 (0)")
    parser.add_argument("--tokens", metavar="N", type=int, default=200, help="inspect: most of each document (200)")
    parser.add_argument("--tokenizer", metavar="FILE", help="inspect: if it is not found beside the shards")
    parser.add_argument("--step", metavar="N", type=int, help="explain: which, as the trainer counts, from 1")
    parser.add_argument("--sequences", metavar="FROM:TO", help="explain: these sequences of --stage instead of a step")


def start(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Called by `jobs.cli` instead of running the engine: nothing is built, and a running job is not disturbed."""
    from jobs import shards_report as report

    where = find(arguments, overrides)
    match arguments.command:
        case "stats":
            for log in where.logs:
                report.print_stats(log.stage, *counts(log))
        case "verify":
            verify_all(where.logs)
        case "inspect":
            log = where.logs[1 if where.config and not arguments.stage else 0]
            report.inspect(log, arguments.sequence, arguments.tokens, report.decoder(where, log, arguments.tokenizer))
        case "explain":
            log, first, last = step_sequences(where, arguments)
            report.explain(where.root, log, first, last)


def find(arguments: argparse.Namespace, overrides: list[str]) -> Where:
    """The stages: held-out first, then the curriculum's. UserError where there are none."""
    if not arguments.config.endswith((".yaml", ".yml")):
        if overrides:
            raise UserError(f"{overrides[0]}: keys of the configuration need a CONFIG.yaml, not a directory")
        log = ShardLog(storage.absolute(arguments.config))
        if arguments.stage not in (None, log.stage.stage):
            raise UserError(f"{log.directory} holds stage {log.stage.stage}, not {arguments.stage}")
        return Where(log.directory.rsplit("/", 1)[0], [log], None)
    config = cli.load_config(arguments.config, overrides)
    names = [HELD_OUT, *(stage.name for stage in config.mix.stages)]
    if arguments.stage not in (None, *names):
        raise UserError(f"the configuration has no stage {arguments.stage}; it has {', '.join(names)}")
    logs = []
    for name in [arguments.stage] if arguments.stage else names:
        if (directory := storage.latest(config.root, f"pack-{name}")) is None:
            raise UserError(f"{config.root} holds no shards of stage {name}; pack it first (jobs/mix.py)")
        logs.append(ShardLog(directory))
    return Where(config.root, logs, config)


def counts(log: ShardLog) -> tuple[bool, dict[str, Any]]:
    """(whether the stage has ended, its totals so far)."""
    if (end := read_end(log.directory)) is not None:
        return True, end["totals"]
    log.wait(0)
    commits = [Commit.load(log.directory, shard_key(shard)) for shard in range(log.shards)]
    return False, add_counts(c.aggregates for c in commits if c is not None)


def verify_all(logs: list[ShardLog]) -> None:
    """Say what is damaged, put it into quarantine, and fail if anything is."""
    damaged = 0
    for log in logs:
        entries, batches = [], 0
        log.wait(0)
        with Progress(f"verify {log.stage.stage}", log.shards, 0, 0) as progress:
            for number, found in verify(log.directory):
                entries += found
                batches += number
                progress.advance(0)
        for entry in entries:
            last = entry["first"] + entry["sequences"]
            say(f"{entry['file']}, batch {entry['batch']}: {entry['why']}; sequences {entry['first']}..{last}")
        quarantine(log.directory, entries)
        say(f"{log.stage.stage}: {batches - len(entries):,} of {batches:,} batches are whole")
        damaged += len(entries)
    if damaged:
        raise UserError(
            f"{damaged} batches are damaged and in quarantine; remove their shards and commits, pack again and verify, "
            "or set train.quarantined to mask"
        )


def step_sequences(where: Where, arguments: argparse.Namespace) -> tuple[ShardLog, int, int]:
    """The log and the sequences [first, last) somebody asks about."""
    stages = [log for log in where.logs if log.stage.stage != HELD_OUT or len(where.logs) == 1]
    if arguments.sequences:
        try:
            first, last = (int(x) for x in arguments.sequences.split(":"))
        except ValueError:
            raise UserError(f"--sequences {arguments.sequences}: give FROM:TO, two numbers") from None
        return stages[0], first, last
    if arguments.step is None or arguments.stage or where.config is None:
        raise UserError("explain needs a CONFIG.yaml and --step N, counted over all stages, or --sequences FROM:TO")
    seen = 0
    for number, (log, first, last) in enumerate(all_steps(stages, where.config), 1):
        seen = number
        if number == arguments.step:
            return log, first, last
    raise UserError(f"there is no step {arguments.step}: what is packed makes steps 1..{seen}")


def all_steps(stages: list[ShardLog], config: Config) -> Iterator[tuple[ShardLog, int, int]]:
    """Every step of the curriculum as the trainer takes them, as far as it is packed."""
    before = 0
    for log in stages:
        sizes = BatchSizes(log.stage.context, config.train.batch_tokens, config.train.batch_marks, before)
        there = log.wait(0)
        for first, last in sizes.steps(there):
            if log.ended or last - first == sizes.at(first):
                yield log, first, last
        if not log.ended:
            return
        before += counts(log)[1].get("packed", there * log.stage.context)


if __name__ == "__main__":
    from jobs.cli import run

    run("shards")
