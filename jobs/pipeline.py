"""Pipeline job: everything in order, from raw text to the exported model; packing and training overlap."""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
import threading
from typing import Any

import numpy as np

from dataprep import storage
from dataprep.storage import join
from dedup.report import total
from jobs import corpus, dedup, mix, plan_report, quality, report, tokens, train
from jobs.config import Config
from jobs.engine import Engine
from jobs.progress import console, say
from mixer.reader import ShardLog


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    summary = data_summary(engine, config)
    prepared = mix.prepare(engine, config)
    plan_report.show(prepared.plan)
    packer = Packer(engine, prepared)
    packer.start()
    try:
        trained = train.build(engine, config)
    except BaseException:
        packer.raise_failure(wait=False)  # a packer that died is why a trainer stopped, not the other way round
        raise
    ends = packer.raise_failure()
    if engine.dry_run:
        return
    summary |= {"plan": prepared.commit.path("plan"), "stages": stage_summary(prepared, ends, trained)}
    summary |= held_out_summary(prepared) | {"model": trained["export"], "checkpoints": trained["directory"]}
    storage.write_json(join(engine.root, "summary.json"), summary)
    print_summary(summary)
    say(f"the same numbers: {join(engine.root, 'summary.json')}")
    say(f"see it, in a browser: {report.write(config, arguments.command_line)}")


class Packer(threading.Thread):
    """Packs all stages while the trainer already follows the first."""

    def __init__(self, engine: Engine, prepared: mix.Prepared):
        super().__init__(name="packer", daemon=True)
        self.engine, self.prepared = engine, prepared
        self.ends: list[dict[str, Any]] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self.ends = mix.pack_all(self.engine, self.prepared)
        except BaseException as error:
            self.failure = error

    def raise_failure(self, wait: bool = True) -> list[dict[str, Any]]:
        """The stages' ends, once packed; raises what stopped the packer."""
        if wait:
            self.join()
        if self.failure:
            raise self.failure
        return self.ends


def data_summary(engine: Engine, config: Config) -> dict[str, Any]:
    """Documents and tokens from the raw input to what may be drawn."""
    built = corpus.build(engine, config)
    quarantined = corpus.totals(built, "quarantined")
    verdicts = total(c.aggregates["sources"] for c in dedup.build(engine, config))
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
        planned, totals = prepared.plan.stage(stage.info.stage), end["totals"]
        achieved = dict.fromkeys(stage.info.classes, 0)
        for cell in totals["cells"]:
            achieved[cell["length_class"]] += cell["tokens"]
        packed = max(1, totals["packed"])
        rows.append(
            {
                "stage": stage.info.stage,
                "context": stage.info.context,
                "tokens_planned": stage.info.tokens,
                "tokens_packed": totals["packed"],
                "sequences": end["sequences"],
                "padding": totals["padding"] / max(1, totals["padding"] + packed),
                "truncated": totals["truncated"],
                "dropped": totals["dropped"],
                "shares_planned": {
                    c: planned.classes.get(c, 0) / max(1, stage.info.tokens) for c in stage.info.classes
                },
                "shares_achieved": {c: n / packed for c, n in achieved.items()},
                "shards": stage.directory,
                **trained["stages"].get(stage.info.stage, {}),
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
    from rich.table import Table

    counts = summary["documents"]
    say(
        f"documents: {counts['in']:,} in, {counts['quarantined']:,} quarantined, {counts['exact']:,} exact and "
        f"{counts['near']:,} near duplicates removed, {counts['kept']:,} kept; "
        f"{sum(summary['tokens'].values()):,} tokens"
    )
    table = Table(title="stages", title_justify="left")
    columns = ("stage", "context", "tokens", "short/medium/long\nplanned %", "\nachieved %", "padding")
    for column in (*columns, "first\nloss", "last\nloss", "held-out\nloss", "tokens/s"):
        table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
    for row in summary["stages"]:
        shares = ["/".join(f"{row[k][c] * 100:.1f}" for c in row[k]) for k in ("shares_planned", "shares_achieved")]
        losses = [
            f"{row[k]:.3f}" if row.get(k) is not None else "" for k in ("first_loss", "last_loss", "held_out_loss")
        ]
        speed = f"{row['tokens_per_second']:,.0f}" if row.get("tokens_per_second") else ""
        table.add_row(
            row["stage"],
            f"{row['context']:,}",
            f"{row['tokens_packed']:,}",
            *shares,
            f"{row['padding']:.2%}",
            *losses,
            speed,
        )
    console.print(table)
    last = [row.get("held_out_loss") for row in summary["stages"] if row.get("held_out_loss") is not None]
    if last:
        say(
            f"held-out loss {last[-1]:.3f} nats per token; unigram entropy of the held-out tokens "
            f"{summary['held_out_unigram_entropy']:.3f}"
        )
    say(f"outputs: {summary['root']}   model: {summary['model']}")


if __name__ == "__main__":
    from jobs.cli import run

    run("pipeline")
