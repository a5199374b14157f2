"""What a step reports: sums over its passes and ranks, then a JSON line, TensorBoard scalars, a line for a person."""

import contextlib
import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixer.reader import ShardLog, StageInfo
from trainer.config import ModelConfig
from trainer.data import Packed
from trainer.model import Output
from trainer.moe import router_metrics
from trainer.parallel import World

SECONDS_BETWEEN_LINES = 5.0
EDGE = 5  # a single step of long sequences holds a handful of documents
WINDOW = 100  # steps that a loss is compared with
COPIES = (*map(str, range(1, 8)), "8+")
FIELDS = {"sources": "source", "classes": "length_class", "tiers": "tier", "copies": "copy"}


class Tally:
    """What the passes of one step add up to; `reduce` adds the other ranks'."""

    def __init__(self, model: ModelConfig, stage: StageInfo, device: torch.device):
        self.names = {"sources": stage.sources, "classes": stage.classes, "tiers": stage.tiers, "copies": COPIES}
        self.top_k = model.top_k
        sizes = [2, 2 * sum(map(len, self.names.values())), model.layers * model.experts, model.layers]
        self.sums = torch.zeros(sum(sizes), dtype=torch.float64, device=device)
        self.loss, groups, load, self.entropy_L = self.sums.split(sizes)
        self.groups, self.load_LE = groups.view(2, -1), load.view(model.layers, -1)

    def add(self, packed: Packed, out: Output, balance: Tensor) -> None:
        """One pass: its loss and balance loss, experts' load, router's entropy; loss and targets of each group."""
        self.loss += torch.stack([out.loss_sum.detach(), balance.detach()])
        self.load_LE += out.routing.load_E
        self.entropy_L += out.routing.entropy
        has_target = packed.target_T >= 0
        weights = torch.stack([out.nll_T.double() * has_target, has_target.double()])
        by_segment = weights.new_zeros(2, len(packed.segments) + 1)  # the last: padding
        by_segment.index_add_(1, packed.segment_T % by_segment.shape[1], weights)
        start = 0
        for kind, names in self.names.items():
            codes = torch.from_numpy(packed.segments[FIELDS[kind]].astype(np.int64)).clamp(max=len(names) - 1)
            self.groups.index_add_(1, start + codes.to(weights.device), by_segment[:, :-1])
            start += len(names)

    def reduce(self, ranks: World) -> tuple[float, float]:
        """Over all ranks: the sums of loss and balance loss."""
        loss, balance = ranks.sum(self.sums)[:2].tolist()
        return loss, balance

    def means(self, tokens: int) -> dict[str, Any]:
        """The router's metrics, and kind -> name -> mean loss of the groups that occur."""
        totals = iter(zip(*self.groups.tolist(), strict=True))
        found: dict[str, Any] = router_metrics(self.load_LE, self.entropy_L, tokens, self.top_k)
        for kind, names in self.names.items():
            found[kind] = {name: loss / n for name, (loss, n) in zip(names, totals, strict=False) if n}
        return found


def documents(log: ShardLog, start: int, stop: int) -> list[dict[str, Any]]:
    """The documents of sequences [start, stop), which are read one at a time."""
    return [
        {"doc": int(s["doc"]), "copy": int(s["copy"]), "offset": int(s["offset"]), "length": int(s["length"]),
         "source": log.stage.sources[s["source"]], "sequence": row}
        for row in range(start, stop)
        for s in log.read(row, row + 1).segments
    ]  # fmt: skip


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a line that a crash has cut off or spoilt is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and "step" in r]


def continued(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of a file up to `step`; those beyond it are removed."""
    kept = [r for r in read(path) if r["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
    temporary.replace(path)
    return kept


class Metrics:
    """A stage's `metrics.jsonl`, `events.jsonl` and TensorBoard files; continued after `step`."""

    def __init__(self, directory: Path, log: ShardLog, step: int, spike: float):
        from torch.utils.tensorboard import SummaryWriter

        self.shards, self.spike, self.path = log, spike, directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        recent = [r["loss"] for r in continued(self.path, step) if r["loss"] is not None]
        continued(directory / "events.jsonl", step)
        self.recent = deque(recent, WINDOW)
        self.file, self.events = self.path.open("a"), (directory / "events.jsonl").open("a")
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        self.said = 0.0

    def log(self, record: dict[str, Any], start: int, stop: int) -> None:
        """Write a step's record: step, loss (None: skipped), ..., and by kind a mapping name -> loss. The documents of
        its sequences [start, stop) are recorded where it was skipped or its loss is a spike."""
        loss = record["loss"]
        write(self.file, record)
        mean, deviation = (float(f(self.recent)) if self.recent else 0.0 for f in (np.mean, np.std))
        if loss is None:
            self.event("skipped", record, start, stop)
        else:
            if len(self.recent) >= WINDOW // 5 and loss > mean + self.spike * deviation:
                self.event("spike", record | {"mean": mean, "deviation": deviation}, start, stop)
            self.recent.append(loss)
        for name, value in record.items():
            for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, float):
                    self.board.add_scalar(f"{name}/{key}" if key else name, number, record["step"])
        stage = self.shards.stage
        if record["stage_tokens"] >= stage.tokens or time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            print(f"{stage.stage}  {line(record, stage.tokens)}", flush=True)

    def event(self, kind: str, record: dict[str, Any], start: int, stop: int) -> None:
        kept = {k: v for k, v in record.items() if k in ("step", "tokens", "loss", "gradient", "mean", "deviation")}
        found = documents(self.shards, start, stop)
        write(self.events, {"event": kind, **kept, "documents": found})
        where = f"its {len(found)} documents are in {self.events.name}"
        print(f"step {record['step']}: {kind}, {line(record, self.shards.stage.tokens)}; {where}", flush=True)

    def close(self) -> dict[str, Any]:
        """The stage's first and last loss (means of up to EDGE steps), resumed or not, and its median speed."""
        for open_file in (self.file, self.events, self.board):
            open_file.close()
        records = [r for r in read(self.path) if r["loss"] is not None]
        losses, speeds = [r["loss"] for r in records], [r["tokens_per_second"] for r in records]
        return {
            "stage_steps": len(records),
            "first_loss": float(np.mean(losses[:EDGE])) if records else None,
            "last_loss": float(np.mean(losses[-EDGE:])) if records else None,
            "tokens_per_second": float(np.median(speeds)) if records else None,
        }


def write(file: Any, record: dict[str, Any]) -> None:
    file.write(json.dumps(record) + "\n")
    file.flush()


def line(record: dict[str, Any], planned: int) -> str:
    """A step's record for a person."""
    parts = [f"{record['stage_tokens']:,} of {planned:,} tokens", f"step {record['step']}"]
    if record["loss"] is None:
        parts.append("skipped: not finite")
    else:
        parts.append(f"loss {record['loss']:.3f}  gradient {record['gradient']:.2f}")
    parts.append(f"lr {record['lr']:.1e}  {record['tokens_per_second']:,.0f} tokens/s  {record['memory_gb']:.1f} GB")
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    if record["wait_seconds"] > 0.05 * record["seconds"]:
        parts.append(f"{record['wait_seconds'] / record['seconds']:.0%} waiting for data")
    return "  ".join(parts)
