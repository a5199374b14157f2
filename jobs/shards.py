"""Shards job: shows, verifies, counts and explains packed shards."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
from collections.abc import Iterator
from typing import Any

from dataprep import storage
from dataprep.storage import Commit, UserError
from jobs import cli, shards_report, tables
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


def flags(parser: argparse.ArgumentParser) -> None:
    about = "; ".join(f"{name}: {what}" for name, what in COMMANDS.items())
    parser.add_argument("command", nargs="?", choices=COMMANDS, default="stats", help=about)
    parser.add_argument("--stage", metavar="NAME", help="only this stage (inspect: the first)")
    parser.add_argument("--sequence", metavar="N", type=int, default=0, help="inspect: which, from 0 (0)")
    parser.add_argument("--tokens", metavar="N", type=int, default=200, help="inspect: most of each document (200)")
    parser.add_argument("--step", metavar="N", type=int, help="explain: which, as the trainer counts, from 1")


def start(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Called by `jobs.cli` instead of running the engine: nothing is built, and a running job is not disturbed."""
    config = cli.load_config(arguments.config, overrides)
    match arguments.command:
        case "stats":
            for log in find(config, arguments.stage):
                for table in shards_report.stats(log.stage, *counts(log)):
                    tables.show(table, shards_report.console, len(table.rows))
        case "verify":
            verify_all(find(config, arguments.stage))
        case "inspect":
            (log,) = find(config, arguments.stage or config.mix.stages[0].name)
            decode = shards_report.decoder(config.root, log)
            shards_report.inspect(log, arguments.sequence, arguments.tokens, decode)
        case "explain":
            if arguments.step is None or arguments.stage:
                raise UserError("explain needs --step N, counted over all stages, and no --stage")
            shards_report.explain(config.root, *sequences_of(arguments.step, find(config, None)[1:], config))


def find(config: Config, stage: str | None) -> list[ShardLog]:
    """The stages, held-out first, or the one of this name. UserError where there are none."""
    names = [HELD_OUT, *(stage.name for stage in config.mix.stages)]
    if stage not in (None, *names):
        raise UserError(f"the configuration has no stage {stage}; it has {', '.join(names)}")
    logs = []
    for name in [stage] if stage else names:
        if (directory := storage.latest(config.root, f"pack-{name}")) is None:
            raise UserError(f"{config.root} holds no shards of stage {name}; pack it first (jobs/mix.py)")
        logs.append(ShardLog(directory))
    return logs


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


def sequences_of(step: int, stages: list[ShardLog], config: Config) -> tuple[ShardLog, int, int]:
    """The log and the sequences [first, last) of a training step."""
    seen = 0
    for number, (log, first, last) in enumerate(all_steps(stages, config), 1):
        seen = number
        if number == step:
            return log, first, last
    raise UserError(f"there is no step {step}: what is packed makes steps 1..{seen}")


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
