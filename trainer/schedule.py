"""Learning rate and batch size in tokens: steps of any size, on any number of workers, see the same curves."""

import math

from dataprep.storage import UserError
from trainer.config import Schedule


def phase_ends(schedule: Schedule, planned: int) -> list[float]:
    """The token of a stage of `planned` tokens at which each phase ends. Raises UserError where they do not fit."""
    lengths = [p.tokens if p.tokens is not None else (p.share or 0) * planned for p in schedule]
    left = planned - sum(lengths)
    rest = [i for i, p in enumerate(schedule) if p.tokens is None and p.share is None]
    if left < -1e-6 * planned or (rest and left <= 0):
        raise UserError(
            f"train.schedule: the phases last {sum(lengths):,.0f} tokens{' and one takes the rest' if rest else ''}, "
            f"but the stage has {planned:,}; shorten them, or give the stage its own schedule in train.stages"
        )
    for i in rest:
        lengths[i] = left
    return [sum(lengths[: i + 1]) for i in range(len(lengths))]


def learning_rate(schedule: Schedule, seen: int, planned: int) -> float:
    """The rate when `seen` of the stage's `planned` tokens have been trained on; beyond the last phase, its last."""
    start, lr = 0.0, 0.0
    for phase, end in zip(schedule, phase_ends(schedule, planned), strict=True):
        if seen <= end:
            x = (seen - start) / max(end - start, 1e-9)
            match phase.shape:
                case "constant":
                    return phase.lr
                case "linear":
                    return lr + (phase.lr - lr) * x
                case "cosine":
                    return phase.lr + (lr - phase.lr) * (1 + math.cos(math.pi * x)) / 2
                case "exponential":
                    return lr * (phase.lr / lr) ** x
        start, lr = end, phase.lr
    return lr
