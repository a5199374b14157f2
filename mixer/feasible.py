"""Whether a curriculum can be had at all, the nearest one that can, and the smallest single changes that make it so."""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_array, hstack, vstack

from mixer.allocate import largest_remainder
from mixer.config import CLASSES, TIERS, MixConfig
from mixer.problem import Cells, Problem, build
from mixer.whole import whole

MARGINS = (0.0, 1e-9, 1e-6, 1e-4, 1e-2, 0.1)  # a linear programme answers to about 1e-7, and is then rounded


@dataclass(frozen=True)
class Fix:
    """A key of the `mix:` section and a value with which the curriculum can be planned. path: keys and list places."""

    path: tuple[str | int, ...]
    value: Any

    def apply(self, config: MixConfig) -> MixConfig:
        values: Any = config.model_dump()
        inner = values
        for key in self.path[:-1]:
            inner = inner[key]
        inner[self.path[-1]] = self.value
        return MixConfig.model_validate(values)

    def __str__(self) -> str:
        value = self.value
        shown = value if isinstance(value, int) else "{" + ", ".join(f"{k}: {v:g}" for k, v in value.items()) + "}"
        return f"set mix.{'.'.join(map(str, self.path))} to {shown}"


class _Program:
    """Linear programmes over what every stage draws from every cell, as parts of what the cell's cap allows.

    A row for each hard target, in parts of its stage's tokens, and one for each cell. room: part of the caps to use.
    """

    def __init__(self, p: Problem, room: float = 1.0):
        self.p, self.room = p, room
        self.s, self.c = np.nonzero(p.open & (p.room > 0))
        stage = np.array([g.stage for g in p.groups])
        self.targets = p.targets / p.tokens[stage]
        self.unit = p.room[self.c] / p.rate[self.s, self.c]
        n, G, C = np.arange(len(self.s)), len(p.groups), len(p.cap)
        parts = self.unit / p.tokens[self.s]
        self.draws = csr_array((parts, (p.group[self.s, self.c], n)), (G, len(n)))
        self.cells = csr_array((np.ones(len(n)), (self.c, n)), (C, len(n)))

    def solve(
        self,
        targets: np.ndarray,
        cost: np.ndarray,
        bounds: list[tuple[float, float]],
        cells: np.ndarray | None = None,
        balance: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """The least cost of E further variables, which enter the targets (G, E) and the cells (C, E) with these
        coefficients and make balance (E,) @ variables = 0. Returns (x (S, C) in tokens, variables); None: impossible.
        """
        n, E = len(self.s), len(cost)
        cells = np.zeros((len(self.p.cap), E)) if cells is None else cells
        balance = np.zeros(E) if balance is None else balance
        equal = vstack([hstack([self.draws, csr_array(targets)]), csr_array(np.append(np.zeros(n), balance)[None])])
        solved = linprog(
            np.append(np.zeros(n), cost),
            A_ub=hstack([self.cells, csr_array(cells)]),
            b_ub=np.full(len(self.p.cap), self.room),
            A_eq=equal,
            b_eq=np.append(self.targets, 0.0),
            bounds=[(0, None)] * n + bounds,
            method="highs",
        )
        if solved.status != 0:
            return None
        x = np.zeros(self.p.usable.shape)
        x[self.s, self.c] = np.maximum(solved.x[:n], 0) * self.unit
        return x, solved.x[n:]


def nearest(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """(planned (S, C), missing (G,)): the least is missing, and of the last stages before the first ones' is."""
    lp = _Program(p)
    stage = np.array([g.stage for g in p.groups])
    weight = p.targets / p.targets.sum() * (1 + stage / len(p.usable))
    solved = lp.solve(np.diag(lp.targets), weight, [(0, 1)] * len(p.groups))
    assert solved is not None  # to draw nothing is a solution
    return whole(p, solved[0])


def fixes(p: Problem, cells: Cells, sources: list[str], config: MixConfig) -> Iterator[Fix]:
    """For each kind of knob - tokens, cap, shares - the smallest change of a single one that is enough, if any is.

    Found by linear programmes, each then proved by planning with it.
    """
    for candidates in (_fewer_tokens(p, config), _higher_caps(p, cells, config), _other_shares(p, config)):
        for _, attempts in sorted(candidates, key=lambda c: c[0]):
            proved = next((fix for fix in attempts if _enough(fix, cells, sources, config)), None)
            if proved:
                yield _sharper(proved, cells, sources, config) if proved.path[-1] == "tokens" else proved
                break


def _enough(fix: Fix, cells: Cells, sources: list[str], config: MixConfig) -> bool:
    return not nearest(build(cells, sources, fix.apply(config)))[1].any()


def _sharper(fix: Fix, cells: Cells, sources: list[str], config: MixConfig) -> Fix:
    """The most tokens that are still enough: a programme scales the stage's whole targets, which round otherwise."""
    asked = config.stages[int(fix.path[1])].tokens
    while (n := fix.value + max(4, int((asked - fix.value) * 2e-6))) < asked:
        more = Fix(fix.path, n)
        if not _enough(more, cells, sources, config):
            break
        fix = more
    return fix


Candidates = list[tuple[float, list[Fix]]]  # size of the change, and ever more cautious roundings of it


def _fewer_tokens(p: Problem, config: MixConfig) -> Candidates:
    lp, found = _Program(p), []
    for i, stage in enumerate(config.stages):
        mine = np.array([[t if g.stage == i else 0.0] for g, t in zip(p.groups, lp.targets, strict=True)])
        if solved := lp.solve(mine, np.ones(1), [(0, 1)]):
            tokens = stage.tokens * (1 - solved[1][0])
            rounded = [int(tokens + 1e-6) - n for n in range(3)] + [int(tokens * (1 - m)) for m in MARGINS]
            attempts = [Fix(("stages", i, "tokens"), n) for n in rounded if 0 < n < stage.tokens]
            found.append((stage.tokens - tokens, attempts))
    return found


def _higher_caps(p: Problem, cells: Cells, config: MixConfig) -> Candidates:
    lp, found = _Program(p), []
    for name in TIERS:
        cap = config.tiers[name].cap
        mine = np.array([[-1.0 if cell["tier"] == name else 0.0] for cell in cells])
        if solved := lp.solve(np.zeros((len(p.groups), 1)), np.ones(1), [(0, 65535 / cap - 1)], mine):
            more = cap * solved[1][0]
            caps = [cap + max(1, ceil(more - 1e-6)) + n for n in range(2)]
            found.append((more, [Fix(("tiers", name, "cap"), n) for n in caps if n <= 65535]))
    return found


def _other_shares(p: Problem, config: MixConfig) -> Candidates:
    found = []
    for i, stage in enumerate(config.stages):
        if stage.shares is None:
            continue
        members = [g for g, group in enumerate(p.groups) if group.stage == i]
        shares = p.targets[members] / stage.tokens
        less_more = np.zeros((len(p.groups), 6))  # what each class's share loses, and what it gains
        less_more[members, :3], less_more[members, 3:] = np.eye(3), -np.eye(3)
        fits = [1.0, 1.0, float(stage.context >= config.thresholds.long)]
        bounds = [(0.0, share) for share in shares] + [(0.0, most) for most in fits]
        attempts, size = [], 0.0
        for margin in MARGINS:
            balance = np.array([1.0] * 3 + [-1.0] * 3)
            if not (solved := _Program(p, 1 - margin).solve(less_more, np.ones(6), bounds, balance=balance)):
                break
            wanted = np.maximum(0.0, shares - solved[1][:3] + solved[1][3:])
            millionths = largest_remainder(10**6, [Fraction(w) for w in wanted.tolist()])
            value = {name: n / 10**6 for name, n in zip(CLASSES, millionths, strict=True)}
            attempts.append(Fix(("stages", i, "shares"), value))
            size = size or float(solved[1].sum()) * stage.tokens / 2
        found.append((size, attempts))
    return found
