"""The plan nearest to what is asked: iterative proportional fitting with caps, on real numbers.

With X a stage's or a cell's sum over x, tokens drawn by stage s and cell c, the least of

    sum over s of  KL(sources of s || shares asked) + spread of s x KL(cells of s || documents x copies)
  + KL(copies of the cells over all stages || the tiers' copies, each source as often as its shares ask)

under the hard targets and the caps. Divergences are of shares, so that every stage counts alike: a scarce source goes
to the small long-context stages first, and the main stage gives way. Each sweep meets one kind of constraint after the
other by scaling: coordinate ascent in the dual (soft ones: unbalanced Sinkhorn, Chizat et al., arXiv 1607.05816).
"""

from dataclasses import dataclass

import numpy as np

from mixer.portable import exp, log
from mixer.problem import Problem

# What the spread over cells counts. A stage that asks for no sources asks for just this: 1. In one that does, nobody
# asks that each source bring tiers and classes in proportion: it only chooses among plans that are as near in all that
# is asked. At 1/4 it cost stages with class shares 3 % of their tokens at the wrong source; at 1/64, a quarter of a
# percent, with tier copies the same (test_plan_fit.py). Smaller still is slower: the sweeps go as its inverse.
ASKING, AS_THEY_COME = 1 / 64, 1.0
SWEEPS, TOLERANCE = 4_000, 1e-9
TINY = 1e-300


@dataclass(frozen=True)
class Fit:
    """x: (S, C) tokens. cap_price: (C,) nats that the objective falls by if the cell's cap allowed one token more.
    group_price: (G,) nats that it rises by for one token more in a hard target; only differences in a stage count.
    """

    x: np.ndarray
    cap_price: np.ndarray
    group_price: np.ndarray
    sweeps: int


def fit(p: Problem) -> Fit:
    """The problem must be feasible; deterministic to the last bit."""
    S, C = p.usable.shape
    J, G, total = p.shares.shape[1], len(p.groups), float(p.tokens.sum())
    T_S1 = p.tokens[:, None].astype(np.float64)
    by_source = p.source[None] + J * np.arange(S)[:, None]

    def sums(x: np.ndarray, index: np.ndarray, n: int) -> np.ndarray:
        return np.bincount(index.ravel(), x.ravel(), n)  # adds in the order of the cells, on any machine

    x = reference(p)
    wanted = np.maximum(p.shares * T_S1, TINY)
    copies = np.maximum(asked_copies(p), TINY)
    room = np.maximum(p.room.astype(np.float64), TINY)
    spread = spreads(p)[:, None]
    power = p.rate * T_S1 / (spread * total)  # of a cell's factor e^m in each of its stages
    targets = p.targets.astype(np.float64)
    drawn = p.allowed.any(axis=0)

    m, n, l = np.zeros(C), np.zeros((S, J)), np.zeros(G)
    log_copies, log_room, log_wanted = log(copies), log(room), log(wanted)
    for sweep in range(1, SWEEPS + 1):
        # Cells: a Newton step on log(copies), which is convex in m, towards the ask or the cap, whichever is less.
        taken = p.rate * x
        sum_C = np.maximum(taken.sum(axis=0), TINY)
        slope = np.maximum((power * taken).sum(axis=0) / sum_C, 1e-6)
        log_sum = log(sum_C)
        soft = (log_copies - m - log_sum) / (1 + slope)
        step = np.where(drawn, np.minimum(soft, (log_room - log_sum) / slope), 0.0)
        m = m + step
        x = x * exp(power * step)
        over = float(np.abs(step).max(initial=0.0))
        # Sources, of the stages that ask: part of the way, as n is paid for by the spread.
        log_sum = log(np.maximum(sums(x, by_source, S * J).reshape(S, J), TINY))
        step = np.where(p.asked[:, None] & (p.shares > 0), (log_wanted - log_sum - spread * n) / (1 + spread), 0.0)
        n = n + step
        x = x * exp(step)[np.arange(S)[:, None], p.source[None]]
        # Hard targets: exactly.
        scale = np.where(targets > 0, targets / np.maximum(sums(x, p.group, G), TINY), 1.0)
        l = l + log(scale)
        x = x * scale[p.group]
        if sweep % 16 == 0 and max(over, float(np.abs(log(scale)).max(initial=0.0))) < TOLERANCE:
            break
    log_sum = log(np.maximum((p.rate * x).sum(axis=0), TINY))
    bound = drawn & (log_sum > log_room - 1e-6)
    cap_price = np.where(bound, np.maximum(0.0, log_copies - log_sum - m), 0.0) / total
    stage = np.array([g.stage for g in p.groups])
    return Fit(x, cap_price, spread[stage, 0] * l / p.tokens[stage], sweep)


def spreads(p: Problem) -> np.ndarray:
    return np.where(p.asked, ASKING, AS_THEY_COME)


def reference(p: Problem) -> np.ndarray:
    """(S, C): each stage's tokens by usable tokens x copies, in stages that ask for shares by source first."""
    J = p.shares.shape[1]
    natural = np.where(p.allowed, p.usable * p.copies, 0.0)
    by_source = np.array([np.bincount(p.source, row, J) for row in natural])
    whole = np.maximum(by_source.sum(axis=1, keepdims=True), TINY)
    share = np.where(p.asked[:, None], p.shares, by_source / whole)
    scale = np.where(by_source > 0, share * p.tokens[:, None] / np.where(by_source > 0, by_source, 1.0), 0.0)
    return natural * scale[:, p.source]


def asked_copies(p: Problem) -> np.ndarray:
    """(C,) tokens over all stages: each source has those its shares ask for, its documents in proportion to copies."""
    J = p.shares.shape[1]
    weight = np.where(p.allowed.any(axis=0), p.copies * p.usable.max(axis=0, initial=0), 0.0)
    of_source = (p.shares * p.tokens[:, None]).sum(axis=0)
    there = np.bincount(p.source, weight, J)
    return weight * np.where(there > 0, of_source / np.where(there > 0, there, 1.0), 0.0)[p.source]
