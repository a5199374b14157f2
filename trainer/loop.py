"""Training, stage after stage: read a batch, step, report, checkpoint."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dataprep.storage import UserError, join, write_json
from mixer.batches import BatchSizes
from mixer.reader import ShardLog
from trainer import checkpoint, hf, signals
from trainer.checkpoint import Damaged, Progress
from trainer.collectives import clip_gradients
from trainer.config import TrainConfig
from trainer.cost import check_memory, explained, memory_needed, memory_used, peak_flops, step_flops
from trainer.data import available, micro_batches
from trainer.evaluate import evaluate
from trainer.metrics import Metrics, Tally
from trainer.model import Decoder, parameter_counts
from trainer.moe import balance_loss
from trainer.parallel import World, alone, build_model, build_optimizer, fsdp_ranks, world
from trainer.schedule import learning_rate, phase_ends
from trainer.signals import Stopped
from trainer.stages import DONE, HELD_OUT, finished, local_root, open_log, run_directory, shards_root
from trainer.vocabulary import load as load_vocabulary


@dataclass
class Run:
    """A stage in training on this rank."""

    config: TrainConfig
    root: str
    directory: Path
    ranks: World
    log: ShardLog
    model: Decoder
    optimizer: torch.optim.Optimizer
    progress: Progress


def train(config: TrainConfig, root: str, stages: list[str]) -> dict[str, Any]:
    """Train the stages in this order, each from the one before it. Called on every rank of the process group.

    Finished stages are skipped, an interrupted one is resumed from its newest checkpoint. Returns `directory`,
    `stages` (name -> its done.json) and `export` (a directory for transformers, or None). On SIGTERM it saves and
    raises `signals.Stopped`.
    """
    root = local_root(root)
    directory = run_directory(config, root, stages)
    with (
        explained(),
        checkpoint.explained(directory),
        signals.heeded(),
        world(config) as ranks,
        alone(directory, ranks),
    ):
        ranks.broadcast(lambda: write_json(join(root, "latest", "train.json"), {"directory": directory.name}))
        done: dict[str, Any] = {}
        previous: Path | None = None
        for stage in stages:
            found = ranks.broadcast(lambda path=directory / stage: finished(path))
            done[stage] = found or train_stage(begin(config, root, stage, directory / stage, previous, ranks))
            previous = directory / stage / done[stage]["checkpoint"]
        export = None
        if config.export and previous is not None:
            export = previous.parent / "hf"
            ranks.broadcast(lambda: None if (export / "config.json").exists() else hf.export(previous, export))
    return {"directory": str(directory), "stages": done, "export": export and str(export)}


def begin(config: TrainConfig, root: str, stage: str, directory: Path, previous: Path | None, ranks: World) -> Run:
    """A stage where it was left, else at its beginning. Raises UserError where it cannot be trained as configured."""
    log = open_log(config, root, stage)
    info = log.stage
    phase_ends(config.stages.get(stage, config.schedule), info.tokens)  # raises where they do not fit
    parameters = parameter_counts(config.model, info.vocab_size)[0]
    sharing = fsdp_ranks(config, ranks.size)
    check_memory(memory_needed(config, info.vocab_size, info.context, parameters, sharing), ranks.device)
    model = build_model(config, info.vocab_size, info.rope_base, ranks)
    run = Run(config, root, directory, ranks, log, model, build_optimizer(config, model), Progress(stage))
    resume(run, previous)
    return run


def resume(run: Run, previous: Path | None) -> None:
    """Continue the stage from its newest checkpoint that is whole, else begin it from the stage before, else from
    `weights`, else from nothing. Raises UserError where there are checkpoints and all are damaged."""
    stage, ranks = run.log.stage, run.ranks
    own: list[Path] = ranks.broadcast(lambda: checkpoint.checkpoints(run.directory)[::-1])
    candidates = own or ([previous] if previous else [])
    for path in candidates:
        try:
            info = ranks.broadcast(lambda path=path: checkpoint.read_info(path))
            for name, mine in (("tokenizer", stage.tokenizer), ("vocabulary", stage.vocab_size)):
                if info.get(name) != mine:
                    was = f"{path} was trained with {name} {info.get(name)}"
                    raise UserError(f"{was}, but stage {stage.stage} was packed with {mine}; run jobs/mix.py")
            there = checkpoint.load(path, run.model, run.optimizer)
        except Damaged:
            if ranks.rank == 0:
                print(f"checkpoint {path} is damaged; looking for an older one", flush=True)
            continue
        # From the stage before, the counters carry over, the place in the shards does not.
        run.progress = there if own else Progress(stage.stage, there.step, there.tokens)
        return
    if candidates:
        raise Damaged.at(*candidates)
    if run.config.weights:
        hf.load(run.model, Path(run.config.weights))


def train_stage(run: Run) -> dict[str, Any]:
    """Train a stage to the end of its shards, which may still be growing; returns what done.json says."""
    config, ranks, progress, stage = run.config, run.ranks, run.progress, run.log.stage
    about = {
        "plan": stage.plan, "tokenizer": stage.tokenizer, "seed": config.seed, "context": stage.context,
        "rope_base": stage.rope_base, "vocabulary": stage.vocab_size, "eos": stage.eos,
        "config": config.model_dump(mode="json"),
    }  # fmt: skip
    metrics = Metrics(run.directory, run.log, progress.step, config.spike) if ranks.rank == 0 else None
    saved, stopped = progress.step if progress.sequence else -1, False
    saver = checkpoint.Saver(ranks, config.keep, config.keep_every)
    try:
        for began, stop in batches(run):
            record = step(run, stop, began)
            if metrics is not None:
                metrics.log(record, progress.sequence, stop)
            progress.advance(record, stop)
            if progress.skipped > config.max_skipped:
                raise UserError(
                    f"stage {stage.stage}, step {progress.step}: loss or gradient not finite, {progress.skipped} such "
                    "steps; lower train.schedule's learning rates, or look at the documents in events.jsonl, and run "
                    "again: it continues from the last checkpoint"
                )
            if progress.step % config.checkpoint_steps == 0:
                saver.save(run.directory, run.model, run.optimizer, progress, about)
                saved = progress.step
    except Stopped:
        stopped = True
    finally:
        saver.wait()
    if saved != progress.step:
        saver.save(run.directory, run.model, run.optimizer, progress, about)
        saver.wait()
    if stopped:
        raise Stopped(f"stopped by SIGTERM and saved {run.directory / progress.checkpoint}")

    done: dict[str, Any] = {"stage": stage.stage, "checkpoint": progress.checkpoint, "steps": progress.step}
    done |= {"tokens": progress.tokens, "stage_tokens": progress.stage_tokens}
    if config.evaluate_tokens:
        done["held_out_loss"] = report(run)["held_out"]["loss"]
    if metrics is not None:
        done |= metrics.close()
    ranks.broadcast(lambda: write_json(str(run.directory / DONE), done))
    return ranks.broadcast(lambda: done)


def batches(run: Run) -> Iterator[tuple[float, int]]:
    """Since when each step's sequences were waited for, and where they stop. Raises Stopped where any rank was sent
    SIGTERM."""
    config, progress = run.config, run.progress
    before = progress.tokens - progress.stage_tokens
    sizes = BatchSizes(run.log.stage.context, config.batch_tokens, config.batch_marks, before)
    while True:
        began = time.perf_counter()
        if run.ranks.sum(torch.tensor(int(signals.State.asked))):
            raise Stopped
        stop = available(run.log, progress.sequence + sizes.at(progress.sequence), run.ranks)
        if stop == progress.sequence:
            return
        yield began, stop


def step(run: Run, stop: int, began: float) -> dict[str, Any]:
    """One optimiser step on the sequences up to `stop`: its metrics, timed from when it `began` to wait for them.

    Where loss or gradient is not finite, nothing is changed, and the record's loss is None.
    """
    config, stage, ranks, progress = run.config, run.log.stage, run.ranks, run.progress
    parts = list(micro_batches(run.log, progress.sequence, stop, config, ranks))
    waited = time.perf_counter() - began
    targets, tokens, squares = ranks.sum(torch.stack([part.counts for part in parts]).sum(0)).tolist()
    stage_tokens = progress.stage_tokens + tokens
    lr = learning_rate(config.stages.get(stage.stage, config.schedule), stage_tokens, max(1, stage.tokens))

    tally = Tally(config.model, stage, ranks.device)
    for part in parts:
        out = run.model(part.token_T, part.layout, part.target_T)
        balance = balance_loss(out.routing.count_GE, out.routing.prob_GE, max(1, tokens))
        (out.loss_sum / max(1, targets) + config.model.aux_loss * balance).backward()
        tally.add(part, out, balance)
    gradient = float(clip_gradients(run.model.parameters(), config.optimizer.clip))
    loss, balance_sum = tally.reduce(ranks)
    finite = math.isfinite(loss) and math.isfinite(gradient)
    if finite:
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    run.optimizer.zero_grad()

    seconds, peak = time.perf_counter() - began, peak_flops(config, ranks.device)
    flops = step_flops(config.model, stage.vocab_size, tokens, squares)
    record = {
        "stage": stage.stage, "step": progress.step + 1, "tokens": progress.tokens + tokens,
        "stage_tokens": stage_tokens, "sequences": stop - progress.sequence, "loss": None, "balance": None,
        "gradient": None, "lr": lr, "seconds": seconds, "wait_seconds": waited, "tokens_per_second": tokens / seconds,
        "memory_gb": memory_used(ranks.device), "mfu": flops / seconds / peak / ranks.size if peak else None,
    }  # fmt: skip
    if finite:
        record |= {"loss": loss / max(1, targets), "balance": balance_sum / config.model.layers, "gradient": gradient}
        record |= tally.means(tokens)
    return record


def report(run: Run) -> dict[str, Any]:
    """Evaluate, and write evaluation.json."""
    config, stage, progress = run.config, run.log.stage, run.progress
    held_out = open_log(config, run.root, HELD_OUT)
    if held_out.stage.plan != stage.plan:
        raise UserError(f"stage {HELD_OUT} was packed for another plan than stage {stage.stage}; run jobs/mix.py")
    vocabulary = load_vocabulary(shards_root(config, run.root), stage.tokenizer, stage.vocab_size)
    about = {"stage": stage.stage, "step": progress.step, "tokens": progress.tokens, "context": stage.context}
    found = about | evaluate(run.model, held_out, stage, vocabulary, config, run.ranks)
    run.ranks.broadcast(lambda: write_json(str(run.directory / "evaluation.json"), found))
    return found


def evaluate_newest(config: TrainConfig, root: str, stage: str) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a stage, trained to its end or not; writes and returns evaluation.json."""
    root = local_root(root)
    directory = run_directory(config, root, [stage]) / stage
    if not checkpoint.checkpoints(directory):
        raise UserError(f"there is no checkpoint of stage {stage} at {directory}; train it first")
    with explained(), world(config) as ranks:
        return report(begin(config, root, stage, directory, None, ranks))
