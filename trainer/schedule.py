"""The learning rate over a stage, in tokens: steps of any size, on any number of workers, see the same curve."""

import math

from trainer.config import Schedule


def learning_rate(schedule: Schedule, progress: float) -> float:
    """The rate when `progress` (0 to 1) of the stage's planned tokens have been seen."""
    start, lr = 0.0, 0.0
    for phase in schedule:
        if progress <= start + phase.share:
            x = (progress - start) / phase.share
            match phase.shape:
                case "constant":
                    return phase.lr
                case "linear":
                    return lr + (phase.lr - lr) * x
                case "cosine":
                    return phase.lr + (lr - phase.lr) * (1 + math.cos(math.pi * x)) / 2
                case "exponential":
                    return lr * (phase.lr / lr) ** x
        start, lr = start + phase.share, phase.lr
    return lr
