"""What a step reports: one JSON line, TensorBoard scalars, and now and then a line for a person."""

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
from trainer.data import Packed

SECONDS_BETWEEN_LINES = 5.0
EDGE = 5  # a single step of long sequences holds a handful of documents
WINDOW = 100  # steps that a loss is compared with
COPIES = (*map(str, range(1, 8)), "8+")
FIELDS = {"sources": "source", "classes": "length_class", "tiers": "tier", "copies": "copy"}


def group_names(stage: StageInfo) -> dict[str, tuple[str, ...]]:
    """The groups that losses are reported by: kind -> names, in the order of the segments' codes."""
    return {"sources": stage.sources, "classes": stage.classes, "tiers": stage.tiers, "copies": COPIES}


def group_sums(nll_T: Tensor, packed: Packed, names: dict[str, tuple[str, ...]]) -> Tensor:
    """(2, groups) float64: the sum of the loss, and the number of targets, of each group's tokens, kind after kind."""
    has_target = packed.target_T >= 0
    weights = torch.stack([nll_T.double() * has_target, has_target.double()])
    by_segment = weights.new_zeros(2, len(packed.segments) + 1)  # the last: padding
    by_segment.index_add_(1, packed.segment_T % by_segment.shape[1], weights)
    sums = []
    for kind, field in FIELDS.items():
        codes = torch.from_numpy(packed.segments[field].astype(np.int64)).clamp(max=len(names[kind]) - 1)
        total = weights.new_zeros(2, len(names[kind]))
        sums.append(total.index_add_(1, codes.to(total.device), by_segment[:, :-1]))
    return torch.cat(sums, dim=1)


def group_means(sums: Tensor, names: dict[str, tuple[str, ...]]) -> dict[str, dict[str, float]]:
    """Kind -> name -> mean loss, for the groups that occur."""
    totals = iter(zip(*sums.tolist(), strict=True))
    return {
        kind: {name: loss / n for name, (loss, n) in zip(group, totals, strict=False) if n}
        for kind, group in names.items()
    }


def documents(log: ShardLog, start: int, stop: int) -> list[dict[str, Any]]:
    """The documents of sequences [start, stop)."""
    own, found = ShardLog(log.directory, "mask"), []  # the trainer's may be in use by another thread
    own.wait(stop)
    for row in range(start, stop):
        segments = own.read(row, row + 1).segments
        found += [
            {"doc": int(s["doc"]), "copy": int(s["copy"]), "offset": int(s["offset"]), "length": int(s["length"]),
             "source": own.stage.sources[s["source"]], "sequence": row}
            for s in segments
        ]  # fmt: skip
    return found


def continued(path: Path, step: int) -> list[dict[str, Any]]:
    """The records of a file up to `step`; those beyond it are removed."""
    kept = [r for r in read(path) if r["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
    temporary.replace(path)
    return kept


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a line that a crash has cut off or spoilt is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and "step" in r]


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
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        mean, deviation = (float(f(self.recent)) if self.recent else 0.0 for f in (np.mean, np.std))
        if loss is None:
            self.event("skipped", record, start, stop)
        elif len(self.recent) >= WINDOW // 5 and loss > mean + self.spike * deviation:
            self.event("spike", record | {"mean": mean, "deviation": deviation}, start, stop)
        if loss is not None:
            self.recent.append(loss)
        for name, value in record.items():
            for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, float):
                    self.board.add_scalar(f"{name}/{key}" if key else name, number, record["step"])
        planned = self.shards.stage.tokens
        if record["stage_tokens"] >= planned or time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            print(f"{self.shards.stage.stage}  {line(record, planned)}", flush=True)

    def event(self, kind: str, record: dict[str, Any], start: int, stop: int) -> None:
        kept = {k: v for k, v in record.items() if k in ("step", "tokens", "loss", "gradient", "mean", "deviation")}
        event = {"event": kind, **kept, "documents": documents(self.shards, start, stop)}
        self.events.write(json.dumps(event) + "\n")
        self.events.flush()
        print(
            f"step {record['step']}: {kind}, {line(record)}; its {len(event['documents'])} documents are in "
            f"{self.events.name}",
            flush=True,
        )

    def summary(self) -> dict[str, Any]:
        """The stage's first and last loss (means of up to EDGE steps), resumed or not, and its median speed."""
        records = [r for r in read(self.path) if r["loss"] is not None]
        if not records:
            return {"first_loss": None, "last_loss": None, "tokens_per_second": None, "stage_steps": 0}
        return {
            "first_loss": float(np.mean([r["loss"] for r in records[:EDGE]])),
            "last_loss": float(np.mean([r["loss"] for r in records[-EDGE:]])),
            "tokens_per_second": float(np.median([r["tokens_per_second"] for r in records])),
            "stage_steps": len(records),
        }

    def close(self) -> None:
        self.file.close()
        self.events.close()
        self.board.close()


def line(record: dict[str, Any], planned: int | None = None) -> str:
    """A step's record for a person."""
    parts = [f"{record['stage_tokens']:,}{f' of {planned:,}' if planned else ''} tokens", f"step {record['step']}"]
    parts.append("skipped: not finite" if record["loss"] is None else f"loss {record['loss']:.3f}")
    if record["gradient"] is not None:
        parts.append(f"gradient {record['gradient']:.2f}")
    parts += [f"lr {record['lr']:.1e}", f"{record['tokens_per_second']:,.0f} tokens/s"]
    if record["mfu"] is not None:
        parts.append(f"MFU {record['mfu']:.1%}")
    parts.append(f"{record['memory_gb']:.1f} GB")
    if record["wait_seconds"] > 0.05 * record["seconds"]:
        parts.append(f"{record['wait_seconds'] / record['seconds']:.0%} waiting for data")
    return "  ".join(parts)
