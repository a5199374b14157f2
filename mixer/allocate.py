"""Sharing out whole tokens: in proportion, within limits, to the last token."""

from collections.abc import Sequence
from fractions import Fraction
from math import floor


def largest_remainder(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Whole numbers in proportion to `weights` that sum to `total`; equal remainders go to the first."""
    whole = sum(weights)
    exact = [total * w / whole if whole else Fraction(0) for w in weights]
    parts = [floor(x) for x in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


def water_fill(total: int, weights: Sequence[Fraction], limits: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, none above its limit, the others in proportion to their weights.

    Where the limits of all with a weight above 0 sum to less than `total`, the result is those limits.
    """
    parts = [0] * len(weights)
    rising = sorted((i for i, w in enumerate(weights) if w > 0), key=lambda i: (limits[i] / weights[i], i))
    rest = sum((weights[i] for i in rising), Fraction(0))
    for place, i in enumerate(rising):
        if limits[i] * rest > total * weights[i]:  # neither this one nor those behind it reach their limits
            open_ = sorted(rising[place:])
            for j, part in zip(open_, largest_remainder(total, [weights[j] for j in open_]), strict=True):
                parts[j] = part
            break
        parts[i] = limits[i]
        total -= limits[i]
        rest -= weights[i]
    return parts
