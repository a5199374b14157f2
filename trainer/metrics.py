"""What a step reports: one JSON line, TensorBoard scalars, and now and then a line for a person."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data import Packed

SECONDS_BETWEEN_LINES = 5.0
EDGE = 5  # a single step of long sequences holds a handful of documents


def loss_by_source(nll_T: Tensor, packed: Packed, sources: int) -> Tensor:
    """(2, sources) float64: the sum of the loss, and the number of targets, of each source's tokens."""
    has_target = packed.target_T >= 0
    source = packed.source_T.clamp(min=0)
    weights = torch.stack([nll_T.double() * has_target, has_target.double()])
    return weights.new_zeros(2, sources).index_add_(1, source, weights)


def mean_by_source(sums: Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """Name -> mean loss, for the sources that occur."""
    return {name: loss / n for name, loss, n in zip(names, *sums.tolist(), strict=True) if n}


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file; a line that a crash has cut off or spoilt is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and "step" in r]


class Metrics:
    """A stage's `metrics.jsonl` and TensorBoard files; continued after `step`, what lies beyond it is forgotten."""

    def __init__(self, directory: Path, stage: str, planned: int, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.stage, self.planned, self.path = stage, planned, directory / "metrics.jsonl"
        directory.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read(self.path) if r["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        temporary.replace(self.path)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
        self.said = 0.0

    def log(self, record: dict[str, Any]) -> None:
        """`record`: step, tokens, stage_tokens, loss, lr, ..., and `sources`: name -> loss."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        for name, value in record.items():
            if isinstance(value, float):
                self.board.add_scalar(name, value, record["step"])
        for name, value in record["sources"].items():
            self.board.add_scalar(f"source/{name}", value, record["step"])
        done = record["stage_tokens"] >= self.planned
        if done or time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self.said = time.monotonic()
            print(
                f"{self.stage}  {record['stage_tokens']:,} of {self.planned:,} tokens  step {record['step']}  "
                f"loss {record['loss']:.3f}  lr {record['lr']:.1e}  gradient {record['gradient']:.2f}  "
                f"{record['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )

    def summary(self) -> dict[str, Any]:
        """The stage's first and last loss (means of up to EDGE steps), resumed or not, and its median speed."""
        records = read(self.path)
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
        self.board.close()
