"""From real numbers to whole tokens: hard targets to the last token, no cap exceeded, or exactly what is missing."""

from fractions import Fraction
from math import floor

import numpy as np

from mixer.allocate import water_fill
from mixer.problem import Problem


def whole(p: Problem, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(planned (S, C), missing (G,)), whole numbers near x; the last stages choose first.

    What a first pass in proportion to x leaves missing is looked for along augmenting paths: a cell with room, or one
    that another target can give up because it finds the same elsewhere. Where a cell's usable tokens are the same in
    all its stages (`split`, the default), that is a maximum flow: what is still missing then is nowhere.
    """
    planned = np.zeros(p.usable.shape, np.int64)
    missing = p.targets.copy()
    for g in range(len(p.groups) - 1, -1, -1):
        s = p.groups[g].stage
        members = np.nonzero(p.allowed[s] & (p.group[s] == g) & (x[s] > 0))[0].tolist()
        limits = [_left(p, planned, s, c) for c in members]
        parts = water_fill(int(missing[g]), [Fraction(float(v)) for v in x[s, members]], limits)
        planned[s, members] = parts
        missing[g] -= sum(parts)
    if missing.any():
        left = np.array([[_left(p, planned, s, c) for c in range(p.usable.shape[1])] for s in range(len(planned))])
        for g in range(len(p.groups) - 1, -1, -1):
            while missing[g] and (moved := _augment(p, planned, left, g, int(missing[g]))):
                missing[g] -= moved
    return planned, missing


def _left(p: Problem, planned: np.ndarray, s: int, c: int) -> int:
    """Tokens that stage s may still draw from cell c."""
    if not p.allowed[s, c]:
        return 0
    taken = sum(
        (Fraction(int(t), int(u)) for t, u in zip(planned[:, c], p.usable[:, c], strict=True) if t), Fraction(0)
    )
    return max(0, floor((int(p.cap[c]) - taken) * int(p.usable[s, c])))


def _augment(p: Problem, planned: np.ndarray, left: np.ndarray, start: int, wanted: int) -> int:
    """Draw up to `wanted` more tokens for the target `start`; 0 where no path leads to a cell with room."""
    came: dict[int, tuple[int, int]] = {start: (start, -1)}  # target -> (who wants what it draws from this cell, cell)
    queue = [start]
    for g in queue:
        s = p.groups[g].stage
        mine = p.allowed[s] & (p.group[s] == g)
        room = np.where(mine, left[s], 0)
        if room.any():
            return _shift(p, planned, left, came, g, int(np.argmax(room)), wanted)
        for h in range(len(p.groups)):
            if h not in came:
                t = p.groups[h].stage
                gives = np.where(mine & (p.group[t] == h) & (p.usable[t] == p.usable[s]), planned[t], 0)
                if t != s and gives.any():
                    came[h] = (g, int(np.argmax(gives)))
                    queue.append(h)
    return 0


def _shift(
    p: Problem, planned: np.ndarray, left: np.ndarray, came: dict[int, tuple[int, int]], g: int, cell: int, wanted: int
) -> int:
    """Along the path that ends at target g with room in `cell`, every target takes what the next one gives up."""
    steps = [(g, cell)]
    while steps[-1][0] != came[steps[-1][0]][0]:
        steps.append(came[steps[-1][0]])  # (who takes, from which cell); the giver is the step before
    amount = min(wanted, int(left[p.groups[g].stage, cell]))
    givers = [p.groups[h].stage for h, _ in steps]
    amount = min([amount, *(int(planned[t, c]) for t, (_, c) in zip(givers, steps[1:], strict=False))])
    for t, (_, c) in zip(givers, steps[1:], strict=False):
        planned[t, c] -= amount
    for taker, c in steps:
        planned[p.groups[taker].stage, c] += amount
    for _, c in steps:
        left[:, c] = [_left(p, planned, s, c) for s in range(len(planned))]
    return amount
