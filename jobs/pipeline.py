"""Pipeline job: everything in order, from raw text to the exported model; packing and training overlap."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import numpy as np

from dataprep import storage
from dataprep.storage import join
from jobs import corpus, dedup, mix, plan_report, quality, report, tokens, train
from jobs.config import Config
from jobs.engine import Engine
from jobs.progress import say
from jobs.tables import Table, show
from mixer.reader import ShardLog

T = TypeVar("T")


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    summary = data_summary(engine, config)
    prepared = mix.prepare(engine, config)
    plan_report.show_plan(prepared.plan)
    packing = in_background(lambda: mix.pack_all(engine, prepared))
    try:
        trained = train.build(engine, config)  # already follows the first stage
    except BaseException:
        if packing.done():
            packing.result()  # a packer that died is why a trainer stopped, not the other way round
        raise
    ends = packing.result()
    if engine.dry_run:
        return
    summary |= {"plan": prepared.commit.path("plan"), "stages": stage_summary(prepared, ends, trained)}
    summary |= held_out_summary(prepared) | {"model": trained["export"], "checkpoints": trained["directory"]}
    storage.write_json(join(engine.root, "summary.json"), summary)
    print_summary(summary)
    say(f"the same numbers: {join(engine.root, 'summary.json')}")
    say(f"see it, in a browser: {report.write(config, arguments.command_line)}")


def in_background(action: Callable[[], T]) -> Future[T]:
    """Run it in a daemon thread, which a main thread that gives up does not wait for (as it would for a pool's)."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="packer", daemon=True).start()
    return future


def data_summary(engine: Engine, config: Config) -> dict[str, Any]:
    """Documents and tokens from the raw input to what may be drawn."""
    built = corpus.build(engine, config)
    quarantined = corpus.totals(built, "quarantined")
    verdicts = storage.add_up(c.aggregates["sources"] for c in dedup.build(engine, config))
    reasons = {
        reason: sum(source.get(reason, {}).get("documents", 0) for source in verdicts.values())
        for reason in ("kept", "exact", "near")
    }
    bad = sum(n for reasons in quarantined.values() for n in reasons.values())
    good = sum(corpus.totals(built, "documents").values())
    return {
        "root": engine.root,
        "documents": {"in": good + bad, "quarantined": bad, **reasons},
        "quarantined": quarantined,
        "sources": verdicts,
        "tiers": quality.tiers(quality.build(engine, config)),
        "tokens": corpus.totals(tokens.build(engine, config), "tokens"),
    }


def stage_summary(prepared: mix.Prepared, ends: list[dict], trained: dict[str, Any]) -> list[dict[str, Any]]:
    """For each stage: planned and achieved shares, padding, losses, speed, where its shards are."""
    rows = []
    for stage, end in zip(prepared.stages, ends, strict=True):
        info, totals = stage.info, end["totals"]
        planned = prepared.plan.stage(info.stage).classes
        shares = totals["shares"]["length_class"]
        rows.append(
            {
                "stage": info.stage,
                "context": info.context,
                "tokens_planned": info.tokens,
                "tokens_packed": totals["packed"],
                "sequences": end["sequences"],
                "padding": totals["padding_share"],
                "truncated": totals["truncated"],
                "dropped": totals["dropped"],
                "shares_planned": {c: planned.get(c, 0) / max(1, info.tokens) for c in info.classes},
                "shares_achieved": {c: shares.get(c, [0, 0])[1] for c in info.classes},
                "shards": stage.directory,
                **trained["stages"].get(info.stage, {}),
            }
        )
    return rows


def held_out_summary(prepared: mix.Prepared) -> dict[str, float]:
    """Unigram entropy of the held-out tokens, nats per token: the loss of a model that knows only frequencies."""
    log = ShardLog(prepared.stages[0].directory)
    counts = np.zeros(log.stage.vocab_size, np.int64)
    for start in range(0, (total := log.wait(1 << 62)), 256):
        batch = log.read(start, min(total, start + 256))
        real = np.bincount(batch.segments["sequence"], batch.segments["length"], len(batch.tokens))
        mask = np.arange(batch.tokens.shape[1]) < real[:, None]
        counts += np.bincount(batch.tokens[mask], minlength=len(counts))
    share = counts[counts > 0] / max(1, counts.sum())
    return {"held_out_unigram_entropy": float(-(share * np.log(share)).sum())}


def print_summary(summary: dict[str, Any]) -> None:
    counts = summary["documents"]
    say(
        f"documents: {counts['in']:,} in, {counts['quarantined']:,} quarantined, {counts['exact']:,} exact and "
        f"{counts['near']:,} near duplicates removed, {counts['kept']:,} kept; "
        f"{sum(summary['tokens'].values()):,} tokens"
    )
    rows = []
    for row in summary["stages"]:
        shares = ["/".join(f"{x * 100:.1f}" for x in row[k].values()) for k in ("shares_planned", "shares_achieved")]
        losses = [row.get(name) for name in ("first_loss", "last_loss", "held_out_loss")]
        speed = row.get("tokens_per_second")
        sizes = [row["context"], row["tokens_packed"]]
        rows.append([row["stage"], *sizes, *shares, row["padding"], *losses, speed and round(speed)])
    columns = "stage, context:count, tokens:count, short/medium/long\nplanned %, \nachieved %, padding:share"
    columns += ", first\nloss:number, last\nloss:number, held-out\nloss:number, tokens/s:count"
    show(Table("stages", columns, rows))
    if last := [row["held_out_loss"] for row in summary["stages"] if row.get("held_out_loss") is not None]:
        unigrams = f"unigram entropy of the held-out tokens {summary['held_out_unigram_entropy']:.3f}"
        say(f"held-out loss {last[-1]:.3f} nats per token; {unigrams}")
    say(f"outputs: {summary['root']}   model: {summary['model']}")


if __name__ == "__main__":
    from jobs.cli import run

    run("pipeline")
