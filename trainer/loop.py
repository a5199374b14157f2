"""Training, stage after stage: read a batch, step, report, checkpoint."""

import math
import time
from pathlib import Path
from typing import Any, Literal

import torch

from dataprep.storage import UserError, absolute, is_local, join, read_json, write_json
from mixer.reader import ShardLog
from trainer import checkpoint, hf
from trainer.checkpoint import Damaged, Progress
from trainer.collectives import clip_gradients
from trainer.config import TrainConfig
from trainer.data import available, micro_batches
from trainer.evaluate import evaluate
from trainer.metrics import Metrics, loss_by_source, mean_by_source
from trainer.model import Decoder
from trainer.moe import balance_loss, router_metrics
from trainer.parallel import World, alone, build_model, build_optimizer, world
from trainer.schedule import learning_rate

HELD_OUT = "held-out"
DONE = "done.json"


def open_log(root: str, stage: str, quarantined: Literal["stop", "mask"] = "stop") -> ShardLog:
    """The shards of a stage, by the name they were published under in `latest/`."""
    entry = read_json(join(root, "latest", f"pack-{stage}.json"))
    if entry is None:
        raise UserError(f"{root} holds no shards of stage {stage}; plan and pack it first (jobs/mix.py)")
    return ShardLog(join(root, entry["directory"]), quarantined)


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
    `stages` (name -> its done.json) and `export` (a directory for transformers, or None).
    """
    root = local_root(root)
    directory = run_directory(config, root, stages)
    with checkpoint.explained(directory), world(config) as ranks, alone(directory, ranks):
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
    metrics = Metrics(directory, stage, log.stage.tokens, progress.step) if ranks.rank == 0 else None
    saved = progress.step if progress.sequence else -1

    batch = max(1, config.batch_tokens // log.stage.context)
    while (stop := available(log, progress.sequence + batch, ranks)) > progress.sequence:
        began = time.perf_counter()
        record = step(model, optimizer, log, progress, stop, config, ranks)
        if metrics is not None:
            record["tokens_per_second"] = (record["tokens"] - progress.tokens) / (time.perf_counter() - began)
            metrics.log(record)
        progress.step, progress.sequence = record["step"], stop
        progress.tokens, progress.stage_tokens = record["tokens"], record["stage_tokens"]
        if progress.step % config.checkpoint_steps == 0:
            checkpoint.save(directory, model, optimizer, progress, about, ranks, config.keep)
            saved = progress.step

    if saved != progress.step:
        checkpoint.save(directory, model, optimizer, progress, about, ranks, config.keep)
    done: dict[str, Any] = {"stage": stage, "checkpoint": progress.checkpoint, "steps": progress.step}
    done |= {"tokens": progress.tokens, "stage_tokens": progress.stage_tokens}
    if config.evaluate_tokens:
        done |= evaluate(model, open_log(root, HELD_OUT), config, ranks)
    if metrics is not None:
        metrics.close()
        done |= metrics.summary()
        write_json(str(directory / DONE), done)
    return ranks.broadcast(lambda: done)


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


def step(
    model: Decoder, optimizer: torch.optim.Optimizer, log: ShardLog, progress: Progress, stop: int,
    config: TrainConfig, ranks: World,
) -> dict[str, Any]:  # fmt: skip
    """One optimiser step on the sequences from `progress.sequence` to `stop`; returns its metrics."""
    batches = list(micro_batches(log, progress.sequence, stop, config, ranks))
    counts = torch.tensor([[(b.target_T >= 0).sum(), b.real_T.sum()] for b in batches], device=ranks.device).sum(0)
    targets, tokens = ranks.sum(counts).tolist()
    stage_tokens = progress.stage_tokens + tokens
    schedule = config.stages.get(log.stage.stage, config.schedule)
    lr = learning_rate(schedule, min(1.0, stage_tokens / max(1, log.stage.tokens)))

    sources = len(log.stage.sources)
    sums = torch.zeros(2, sources + 1, dtype=torch.float64, device=ranks.device)  # the last column: balance loss
    load_LE = torch.zeros(config.model.layers, config.model.experts, dtype=torch.int64, device=ranks.device)
    entropy_L = torch.zeros(config.model.layers, dtype=torch.float64, device=ranks.device)
    for batch in batches:
        out = model(batch.token_T, batch.layout, batch.target_T)
        balance = balance_loss(out.routing.count_GE, out.routing.prob_GE, max(1, tokens))
        (out.loss_sum / max(1, targets) + config.model.aux_loss * balance).backward()
        load_LE += out.routing.load_E
        entropy_L += out.routing.entropy
        sums[:, :sources] += loss_by_source(out.nll_T, batch, sources)
        sums[0, sources] += balance.detach()
    gradient = float(clip_gradients(model.parameters(), config.optimizer.clip))
    for x in (sums, load_LE, entropy_L):
        ranks.sum(x)
    loss = float(sums[0, :sources].sum()) / max(1, targets)
    if not (math.isfinite(loss) and math.isfinite(gradient)):
        raise UserError(
            f"stage {log.stage.stage}, step {progress.step + 1}: loss {loss}, gradient norm {gradient}; "
            "lower train.schedule's learning rates and run again: it continues from the last checkpoint"
        )
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return {
        "stage": log.stage.stage, "step": progress.step + 1, "tokens": progress.tokens + tokens,
        "stage_tokens": stage_tokens, "loss": loss, "balance": float(sums[0, sources]) / config.model.layers,
        "gradient": gradient, "lr": lr, "sources": mean_by_source(sums[:, :sources], log.stage.sources),
    } | router_metrics(load_LE, entropy_L, tokens, config.model.top_k)  # fmt: skip
