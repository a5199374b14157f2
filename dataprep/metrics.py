"""How well scores agree with labels: AUC, Spearman's rank correlation and the expected calibration error."""

import numpy as np

BINS = 10


def ranks(values: np.ndarray) -> np.ndarray:
    """float64 ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """The chance that a positive scores above a negative, ties counted half (Mann-Whitney); None without both."""
    yes = int(positive.sum())
    no = len(positive) - yes
    if not yes or not no:
        return None
    return float((ranks(scores)[positive].sum() - yes * (yes + 1) / 2) / (yes * no))


def spearman(scores: np.ndarray, labels: np.ndarray) -> float | None:
    """The correlation of the ranks; None where scores or labels are all the same."""
    a, b = (ranks(x) - (len(x) + 1) / 2 for x in (scores, labels))
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / size) if size else None


def calibration_error(scores: np.ndarray, labels: np.ndarray) -> float:
    """Expected calibration error: |mean score - mean label| over ten bins of equally many rows, weighted by rows."""
    order = np.argsort(scores, kind="stable")
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    gaps = [abs(float(scores[part].mean(dtype=np.float64) - labels[part].mean(dtype=np.float64))) for part in bins]
    return float(np.average(gaps, weights=[len(part) for part in bins]))


def agreement(scores: np.ndarray, labels: np.ndarray) -> dict[str, float | int | None]:
    """All of them, for scores and labels in 0..1; a label of a half or more counts as positive."""
    found = {
        "auc": auc(scores, labels >= 0.5),
        "spearman": spearman(scores, labels),
        "ece": calibration_error(scores, labels),
    }
    return {"rows": len(scores)} | {name: None if x is None else round(x, 4) for name, x in found.items()}
