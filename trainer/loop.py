"""Training, stage after stage: read a batch, step, report, checkpoint."""

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch

from dataprep.storage import UserError, absolute, is_local, join, latest, read_json, write_json
from mixer.batches import BatchSizes
from mixer.reader import ShardLog, StageInfo
from trainer import checkpoint, hf, signals
from trainer.checkpoint import Damaged, Progress
from trainer.collectives import clip_gradients
from trainer.config import TrainConfig
from trainer.cost import check_memory, explained, memory_needed, memory_used, peak_flops, step_flops
from trainer.data import available, micro_batches
from trainer.evaluate import evaluate
from trainer.metrics import Metrics, group_means, group_names, group_sums
from trainer.model import Decoder, parameter_counts
from trainer.moe import balance_loss, router_metrics
from trainer.parallel import World, alone, build_model, build_optimizer, world
from trainer.schedule import learning_rate, phase_ends
from trainer.signals import Stopped
from trainer.vocabulary import load as load_vocabulary

HELD_OUT = "held-out"
DONE = "done.json"
EVALUATION = "evaluation.json"


def open_log(root: str, stage: str, quarantined: Literal["stop", "mask"] = "stop") -> ShardLog:
    """The shards of a stage, by the name they were published under in `latest/`."""
    directory = latest(root, f"pack-{stage}")
    if directory is None:
        raise UserError(f"{root} holds no shards of stage {stage}; plan and pack it first (jobs/mix.py)")
    return ShardLog(directory, quarantined)


def local_root(root: str) -> str:
    """The root as an absolute path, `~` and `file://` resolved. Raises UserError for any other URL."""
    if not is_local(root):
        raise UserError(f"root is {root}: checkpoints need a file system that all workers share; give a local path")
    return absolute(root)


def run_directory(config: TrainConfig, root: str, stages: list[str]) -> Path:
    """Where these stages are trained. Raises UserError where they were not all packed for one plan."""
    plan, *others = (open_log(root, stage).stage.plan for stage in stages)
    for stage, other in zip(stages[1:], others, strict=True):
        if other != plan:
            raise UserError(f"stage {stage} was packed for another plan than stage {stages[0]}; run jobs/mix.py")
    return Path(root) / f"train-{config.identity(plan)}"


def finished(directory: Path) -> dict[str, Any] | None:
    """What a stage's done.json says; None where the stage must be trained (again): there is none, it is damaged, or
    its checkpoint is gone."""
    try:
        done = read_json(str(directory / DONE))
        return done if (directory / done["checkpoint"]).is_dir() else None
    except (UserError, ValueError, TypeError, KeyError):
        return None


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
            done[stage] = found or train_stage(config, root, stage, directory / stage, previous, ranks)
            previous = directory / stage / done[stage]["checkpoint"]
        export = None
        if config.export and previous is not None:
            export = previous.parent / "hf"
            ranks.broadcast(lambda: None if (export / "config.json").exists() else hf.export(previous, export))
    return {"directory": str(directory), "stages": done, "export": export and str(export)}


def train_stage(
    config: TrainConfig, root: str, stage: str, directory: Path, previous: Path | None, ranks: World
) -> dict[str, Any]:
    """Train one stage to the end of its shards, which may still be growing; returns what done.json says."""
    log = open_log(root, stage, config.quarantined)
    phase_ends(config.stages.get(stage, config.schedule), log.stage.tokens)  # raises where they do not fit
    parameters = parameter_counts(config.model, log.stage.vocab_size)[0]
    needed = memory_needed(
        config, log.stage.vocab_size, log.stage.context, parameters, ranks.size // config.parallel.dp_replicate
    )
    check_memory(needed, ranks.device)
    model = build_model(config, log.stage.vocab_size, log.stage.rope_base, ranks)
    if config.weights:
        hf.load(model, Path(config.weights))
    optimizer = build_optimizer(config, model)
    progress = start(stage, directory, previous, log, model, optimizer, ranks)
    about = {
        "plan": log.stage.plan, "tokenizer": log.stage.tokenizer, "seed": config.seed, "context": log.stage.context,
        "rope_base": log.stage.rope_base, "vocabulary": log.stage.vocab_size, "eos": log.stage.eos,
        "config": config.model_dump(mode="json"),
    }  # fmt: skip
    metrics = Metrics(directory, log, progress.step, config.spike) if ranks.rank == 0 else None
    saver = checkpoint.Saver(ranks, config.keep, config.keep_every)
    saved = progress.step if progress.sequence else -1
    try:
        stopped = False
        while not stopped:
            try:
                if (stop := next_batch(log, progress, config, ranks)) <= progress.sequence:
                    break
            except Stopped:
                stopped = True
                break
            record, stopped = step(model, optimizer, log, progress, stop, config, ranks)
            if metrics is not None:
                metrics.log(record, progress.sequence, stop)
            progress.step, progress.sequence = record["step"], stop
            progress.tokens, progress.stage_tokens = record["tokens"], record["stage_tokens"]
            progress.skipped += record["loss"] is None
            if progress.skipped > config.max_skipped:
                raise UserError(
                    f"stage {stage}, step {progress.step}: loss or gradient not finite, {progress.skipped} such "
                    "steps; lower train.schedule's learning rates, or look at the documents in events.jsonl, and run "
                    "again: it continues from the last checkpoint"
                )
            if progress.step % config.checkpoint_steps == 0 and not stopped:
                saver.save(directory, model, optimizer, progress, about)
                saved = progress.step
        if saved != progress.step:
            saver.save(directory, model, optimizer, progress, about)
        saver.wait()
        if stopped:
            raise Stopped(f"stopped by SIGTERM and saved {directory / progress.checkpoint}")
    finally:
        saver.close()

    done: dict[str, Any] = {"stage": stage, "checkpoint": progress.checkpoint, "steps": progress.step}
    done |= {"tokens": progress.tokens, "stage_tokens": progress.stage_tokens}
    if config.evaluate_tokens:
        found = report(model, config, root, log.stage, progress, directory, ranks)
        done |= {"held_out_loss": found["held_out"]["loss"], "held_out_tokens": found["held_out"]["tokens"]}
        done |= {"held_out_bits_per_byte": found["held_out"]["bits_per_byte"]}
        done |= {"held_out_sources": {name: score["loss"] for name, score in found["sources"].items()}}
    if metrics is not None:
        metrics.close()
        done |= metrics.summary()
        write_json(str(directory / DONE), done)
    return ranks.broadcast(lambda: done)


def report(
    model: Decoder, config: TrainConfig, root: str, stage: StageInfo, progress: Progress, directory: Path, ranks: World
) -> dict[str, Any]:
    """Evaluate, and write evaluation.json."""
    vocabulary = load_vocabulary(root, stage.tokenizer, stage.vocab_size)
    about = {"stage": stage.stage, "step": progress.step, "tokens": progress.tokens, "context": stage.context}
    found = about | evaluate(model, open_log(root, HELD_OUT), stage, vocabulary, config, ranks)
    ranks.broadcast(lambda: write_json(str(directory / EVALUATION), found))
    return found


def evaluate_newest(config: TrainConfig, root: str, stage: str) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a stage, trained to its end or not; writes and returns evaluation.json."""
    root = local_root(root)
    directory = run_directory(config, root, [stage]) / stage
    if not checkpoint.checkpoints(directory):
        raise UserError(f"there is no checkpoint of stage {stage} at {directory}; train it first")
    with explained(), world(config) as ranks:
        log = open_log(root, stage)
        model = build_model(config, log.stage.vocab_size, log.stage.rope_base, ranks)
        progress = start(stage, directory, None, log, model, build_optimizer(config, model), ranks)
        return report(model, config, root, log.stage, progress, directory, ranks)


def start(
    stage: str, directory: Path, previous: Path | None, log: ShardLog, model: Decoder,
    optimizer: torch.optim.Optimizer, ranks: World,
) -> Progress:  # fmt: skip
    """Continue the stage from its newest checkpoint that is whole, else begin it from the stage before, else from
    nothing. Raises UserError where there are checkpoints and all are damaged."""
    own: list[Path] = ranks.broadcast(lambda: checkpoint.checkpoints(directory)[::-1])
    candidates = own or ([previous] if previous else [])
    for path in candidates:
        try:
            info = ranks.broadcast(lambda path=path: checkpoint.read_info(path))
            for name, mine in (("tokenizer", log.stage.tokenizer), ("vocabulary", log.stage.vocab_size)):
                if info.get(name) != mine:
                    was = f"{path} was trained with {name} {info.get(name)}"
                    raise UserError(f"{was}, but stage {stage} was packed with {mine}")
            progress = checkpoint.load(path, model, optimizer)
        except Damaged:
            if ranks.rank == 0:
                print(f"checkpoint {path} is damaged; looking for an older one", flush=True)
            continue
        # From the stage before, the counters carry over, the place in the shards does not.
        return progress if own else Progress(stage, progress.step, progress.tokens)
    if candidates:
        raise Damaged.at(*candidates)
    return Progress(stage)


def next_batch(log: ShardLog, progress: Progress, config: TrainConfig, ranks: World) -> int:
    """Wait for the next step's sequences: where they stop."""
    before = progress.tokens - progress.stage_tokens
    sizes = BatchSizes(log.stage.context, config.batch_tokens, config.batch_marks, before)
    return available(log, progress.sequence + sizes.at(progress.sequence), ranks)


def step(
    model: Decoder, optimizer: torch.optim.Optimizer, log: ShardLog, progress: Progress, stop: int,
    config: TrainConfig, ranks: World,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """One optimiser step on the sequences from `progress.sequence` to `stop`: its metrics, and whether to stop here.

    Where loss or gradient is not finite, nothing is changed, and the record's loss is None.
    """
    began, stage = time.perf_counter(), log.stage
    batches = list(micro_batches(log, progress.sequence, stop, config, ranks))
    waited = time.perf_counter() - began
    counts = torch.zeros(4, dtype=torch.int64, device=ranks.device)
    for batch in batches:
        counts[0] += (batch.target_T >= 0).sum()
        counts[1] += batch.real_T.sum()
        if batch.layout.part.start == 0:  # one rank of those that share the sequences
            counts[2] += int((batch.segments["length"] ** 2).sum())
    counts[3] = signals.asked()
    targets, tokens, squares, asked = ranks.sum(counts).tolist()
    stage_tokens = progress.stage_tokens + tokens
    lr = learning_rate(config.stages.get(stage.stage, config.schedule), stage_tokens, max(1, stage.tokens))

    names = group_names(stage)
    totals = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, balance loss
    groups = torch.zeros(2, sum(map(len, names.values())), dtype=torch.float64, device=ranks.device)
    load_LE = torch.zeros(config.model.layers, config.model.experts, dtype=torch.int64, device=ranks.device)
    entropy_L = torch.zeros(config.model.layers, dtype=torch.float64, device=ranks.device)
    for batch in batches:
        out = model(batch.token_T, batch.layout, batch.target_T)
        balance = balance_loss(out.routing.count_GE, out.routing.prob_GE, max(1, tokens))
        (out.loss_sum / max(1, targets) + config.model.aux_loss * balance).backward()
        load_LE += out.routing.load_E
        entropy_L += out.routing.entropy
        totals += torch.stack([out.loss_sum.detach(), balance.detach()])
        groups += group_sums(out.nll_T, batch, names)
    gradient = float(clip_gradients(model.parameters(), config.optimizer.clip))
    loss_sum, balance_sum = ranks.sum(totals).tolist()
    finite = math.isfinite(loss_sum) and math.isfinite(gradient)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    for x in (groups, load_LE, entropy_L):
        ranks.sum(x)
    seconds = time.perf_counter() - began
    peak = peak_flops(config, ranks.device)
    record = {
        "stage": stage.stage, "step": progress.step + 1, "tokens": progress.tokens + tokens,
        "stage_tokens": stage_tokens, "sequences": stop - progress.sequence,
        "loss": loss_sum / max(1, targets) if finite else None, "balance": balance_sum / config.model.layers,
        "gradient": gradient if finite else None, "lr": lr, "seconds": seconds, "wait_seconds": waited,
        "tokens_per_second": tokens / seconds, "memory_gb": memory_used(ranks.device), "mfu": None,
    }  # fmt: skip
    if peak:
        record["mfu"] = step_flops(config.model, stage.vocab_size, tokens, squares) / seconds / peak / ranks.size
    if not finite:
        return record | {"balance": None}, asked > 0
    routing = router_metrics(load_LE, entropy_L, tokens, config.model.top_k)
    return record | routing | group_means(groups, names), asked > 0
