"""Mix job: plans the curriculum, draws documents for every stage and packs them into the shard log."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from dataprep import storage, tokenizer
from dataprep.storage import Attempt, Commit, UserError, join, read_table
from jobs import corpus, dedup, plan_report, quality, tokens
from jobs.config import Config
from jobs.engine import Engine, Step, Task, once_per_run
from jobs.progress import say
from mixer import guarantees, shards
from mixer.config import HELD_OUT, MixConfig
from mixer.draw import draw
from mixer.exclude import load_exclude
from mixer.inventory import add_inventories, longest_context, take_inventory
from mixer.pack import pack_window
from mixer.plan import Plan
from mixer.planner import make_plan
from mixer.shards import StageInfo

VERSION = 6
PLAN_VERSION = 5
LATEST = "latest"  # what --diff compares with if no file is named
BEAT_SECONDS = 5.0


@dataclass(frozen=True)
class StageLog:
    """One stage's place on storage: the step that packs it and what its stage.json says."""

    step: Step
    info: StageInfo
    directory: str

    @property
    def ended(self) -> bool:
        return storage.exists(join(self.directory, "end.json"))


@dataclass(frozen=True)
class Prepared:
    """All that packing needs: the plan and its commit, the stages (held-out first), the partitions to draw from."""

    plan: Plan
    commit: Commit
    stages: list[StageLog]
    draws: list[Task]


@once_per_run
def inventory(engine: Engine, config: Config) -> tuple[list[Commit], list[Commit], str]:
    """(inventory commits, tokens commits, tokeniser's fingerprint): what there is to draw from, by partition."""
    mix = config.mix
    partitions = corpus.partitions(engine, config)
    verdicts, scores = dedup.build(engine, config), quality.build(engine, config)
    tokenizer_print = tokens.build_tokenizer(engine, config)[1]
    ids = tokens.build(engine, config)
    about = mix.model_dump(mode="json", include={"thresholds", "seed"})
    about["held_out"], about["longest"] = mix.held_out.fraction, longest_context(mix)
    about["stages"] = [[s.context, s.long_documents] for s in mix.stages]
    lines = load_exclude(mix.exclude)["id"].to_pylist()
    about["exclude"] = storage.fingerprint(lines)
    about["contaminated"] = config.quality.decontaminate.drops
    tasks = []
    for p, verdict, score, encoded in zip(partitions, verdicts, scores, ids, strict=True):
        paths = (verdict.path("dedup"), score.path("quality"), encoded.path("tokens"))
        inputs = {"dedup": verdict.fingerprint, "quality": score.fingerprint, "tokens": encoded.fingerprint}
        tasks.append(p.task(*paths, mix, config.quality.decontaminate.drops, **inputs))
    inventories = engine.map(Step("inventory", VERSION, about), take_partition, tasks)
    unused = set(lines).difference(*(c.aggregates["exclude_lines"] for c in inventories))
    if unused:
        examples = ", ".join(sorted(unused)[:5])
        say(f"warning: {len(unused):,} of {len(lines):,} lines of {mix.exclude} name no document: {examples}, ...")
    return inventories, ids, tokenizer_print


def take_partition(
    out: Attempt, documents: str, verdicts: str, scores: str, ids: str, mix: MixConfig, drop: bool
) -> dict:
    table, sums = take_inventory(
        read_table(documents, ["doc", "source", "id", "content_hash"]),
        read_table(verdicts, ["doc", "keep", "cluster"]),
        read_table(scores, ["doc", "tier", "contaminated"] if drop else ["doc", "tier"]),
        read_table(ids, ["doc", "n_tokens"]),
        mix,
        load_exclude(mix.exclude),
    )
    out.arrow("inventory", [table], table.schema)
    return sums


@once_per_run
def planned(engine: Engine, config: Config) -> Commit:
    """The plan's commit, with `plan` (JSON) and `places`."""
    inventories = inventory(engine, config)[0]
    inputs = {c.key: c.fingerprint for c in inventories}
    task = Task("all", inputs, ([(c.directory, c.key) for c in inventories], config.mix))
    return engine.once(Step("plan", PLAN_VERSION, config.mix.recipe), plan_all, task)


@once_per_run
def prepare(engine: Engine, config: Config) -> Prepared:
    """Plan, and write every stage's stage.json, so that a trainer can start before the first shard is packed."""
    inventories, ids, tokenizer_print = inventory(engine, config)
    commit = planned(engine, config)
    plan = load_plan(commit.path("plan"), commit.path("places"))
    path, _ = tokens.build_tokenizer(engine, config)
    coder = tokenizer.load(path, config.tokens)
    # The plan holds counts; the shards hold ids. Both go into the fingerprint that names and guards the shards.
    fingerprint = storage.fingerprint([plan.fingerprint, tokenizer_print, {c.key: c.fingerprint for c in ids}])
    if not engine.dry_run:  # the trainer evaluates with the tokeniser
        here = path.removeprefix(f"{engine.root}/")
        used = {"path": here, "tokenizer": tokenizer_print, "eos": config.tokens.eos, "bos": config.tokens.bos}
        storage.ensure_json(storage.join(engine.root, "latest", "vocabulary.json"), used)
    stages = []
    for stage in (plan.held_out, *plan.stages):
        shards_as = {"plan": fingerprint, "compression": config.mix.compression}
        info = plan.stage_info(stage.name, coder.vocab_size, coder.eos, tokenizer=tokenizer_print, **shards_as)
        about = {"plan": fingerprint, "stage": stage.name, "compression": info.compression}
        pack_step = Step(f"pack-{stage.name}", VERSION, about)
        directory = pack_step.directory(engine.root)
        if not engine.dry_run:
            info.save(directory)
            engine.publish(pack_step)
        stages.append(StageLog(pack_step, info, directory))
    places = (commit.path("plan"), commit.path("places"))
    draws = [
        Task(
            i.key,
            {"inventory": i.fingerprint, "tokens": t.fingerprint},
            (i.path("inventory"), t.path("tokens"), *places),
            t.bytes,
        )
        for i, t in zip(inventories, ids, strict=True)
    ]
    return Prepared(plan, commit, stages, draws)


def plan_all(out: Attempt, inventories: list[tuple[str, str]], mix: MixConfig) -> dict:
    """Sum the inventories' aggregates and plan. The plan is a file a person can read."""
    parts = []
    for directory, key in inventories:
        commit = Commit.load(directory, key)
        assert commit is not None
        parts.append(commit.aggregates)
    plan = make_plan(add_inventories(parts), mix)
    with out.file("plan", ".json") as path, open(path, "w") as file:
        json.dump(plan.to_json(), file, indent=1, ensure_ascii=False)
    out.arrow("places", [plan.places], plan.places.schema)
    return {"stages": {s.name: s.tokens for s in plan.stages}}


@lru_cache(1)
def load_plan(path: str, places: str) -> Plan:
    return Plan.from_json(storage.read_json(path), read_table(places))


def pack_all(engine: Engine, prepared: Prepared) -> list[dict[str, Any]]:
    """Pack every stage, in order, telling those who follow that it is alive. Returns the stages' end.json."""
    with nullcontext() if engine.dry_run else alive([s for s in prepared.stages if not s.ended]):
        return [pack_stage(engine, prepared, stage) for stage in prepared.stages]


def pack_stage(engine: Engine, prepared: Prepared, stage: StageLog) -> dict[str, Any]:
    name, windows = stage.info.stage, stage.info.shards
    cuts = [Task(t.key, t.inputs, (*t.args, name), t.bytes) for t in prepared.draws]
    policy = prepared.plan.stage(name).long_documents
    commits = engine.exchange(
        stage.step, draw_partition, cuts, windows, write_window, lambda r: (stage.info, policy, prepared.plan.seed)
    )
    if engine.dry_run:
        return shards.read_end(stage.directory) or {}
    table = prepared.plan.places.select(["tier", "cap", "held_out"])
    caps = {row["tier"]: row["cap"] for row in table.to_pylist() if row["held_out"] == (name == HELD_OUT)}
    counts = guarantees.add_counts(c.aggregates for c in commits)
    totals = guarantees.summary(counts, prepared.plan.stage(name), caps)
    if wrong := guarantees.broken(totals, stage.info.context):
        raise UserError(
            f"stage {name} is not packed as promised: {'; '.join(wrong)}; remove {stage.directory} and report it"
        )
    end = shards.write_end(stage.directory, [c.aggregates["sequences"] for c in commits], totals)
    storage.remove(join(stage.directory, shards.HEARTBEAT))
    return end


def draw_partition(inventory_path: str, ids: str, plan: str, places: str, stage: str) -> tuple[pa.Table, np.ndarray]:
    table = draw(read_table(inventory_path), read_table(ids), load_plan(plan, places), stage)
    return table, table["window"].to_numpy()


def write_window(out: Attempt, drawn: pa.Table, window: int, info: StageInfo, policy: str, seed: int) -> dict:
    packed = pack_window(drawn, info, policy, seed)
    shards.write_shard(out, packed.tokens, packed.segments, info)
    return packed.counts


@contextmanager
def alive(stages: list[StageLog]) -> Iterator[None]:
    """Beat the stages' hearts while the block runs; if it fails, say so there, so that nobody waits for ever."""
    stop, failed = threading.Event(), None

    def beat() -> None:
        for stage in stages:
            if not stage.ended:
                shards.beat(stage.directory, failed)

    def go_on() -> None:
        while not stop.wait(BEAT_SECONDS):
            beat()

    beat()
    thread = threading.Thread(target=go_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        failed = str(error) or type(error).__name__
        raise
    finally:
        stop.set()
        thread.join()
        if failed:
            beat()


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan-only", action="store_true", help="plan, print the plan, and pack nothing")
    parser.add_argument("--explain", metavar="CELL", help="plan, and show a cell's arithmetic: SOURCE/TIER/CLASS")
    parser.add_argument(
        "--diff",
        metavar="PLAN.json",
        nargs="?",
        const=LATEST,
        help="say what would change from this plan (default: the latest one under the root) and write no plan",
    )


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    if arguments.diff:
        return say_changes(engine, config, arguments.diff)
    commit = planned(engine, config)
    plan = load_plan(commit.path("plan"), commit.path("places"))
    if arguments.explain:
        for line in plan_report.explain(plan, arguments.explain):
            say(line)
        return
    plan_report.show_plan(plan)
    say(f"plan: {commit.path('plan')}")
    if arguments.plan_only:
        return
    prepared = prepare(engine, config)
    ends = pack_all(engine, prepared)
    if not engine.dry_run:
        names = [stage.info.stage for stage in prepared.stages]
        plan_report.show_packed(plan, {n: end["totals"] for n, end in zip(names, ends, strict=True)})
        for stage in prepared.stages:
            say(f"{stage.info.stage}: {stage.directory}")


def say_changes(engine: Engine, config: Config, path: str) -> None:
    """Plan in memory and compare: what `latest` points to is left alone."""
    if path == LATEST:
        directory = storage.latest(engine.root, "plan")
        if (commit := Commit.load(directory, "all") if directory else None) is None:
            raise UserError(f"--diff: there is no plan under {engine.root} yet; name a plan's JSON file")
        path = commit.path("plan")
    try:
        old = json.loads(storage.read_bytes(path))
        stages = [str(stage["name"]) for stage in old["stages"]]
    except FileNotFoundError:
        raise UserError(f"--diff: there is no file {path}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--diff: {path} is no plan; name a plan's JSON file, or none for the newest") from None
    plan = make_plan(add_inventories(c.aggregates for c in inventory(engine, config)[0]), config.mix)
    say(f"from {path}:")
    for line in plan_report.diff(old, plan, plan_report.under_way(engine.root, stages)):
        say(line)


if __name__ == "__main__":
    from jobs.cli import run

    run("mix")
