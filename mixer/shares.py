"""Which share of its tokens a stage asks of each source, at every moment: weights, a transition, a late blend."""

from dataclasses import dataclass

import numpy as np

from mixer.config import MixConfig, Stage


@dataclass(frozen=True)
class Course:
    """A stage's shares as a function of x, the part of the stage that is over: linear between knots.

    x: (K,) from 0 to 1, not decreasing; two knots with one x make a step. shares: (K, J), each row sums to 1.
    """

    x: np.ndarray
    shares: np.ndarray

    @property
    def widths(self) -> np.ndarray:
        """(K,): the integral of the shares is `widths @ shares` (trapezoids)."""
        steps = np.diff(self.x)
        return (np.append(steps, 0.0) + np.append(0.0, steps)) / 2

    @property
    def mean(self) -> np.ndarray:
        return (self.widths[:, None] * self.shares).sum(axis=0)


def courses(config: MixConfig, sources: list[str], natural: np.ndarray) -> list[Course]:
    """One course per stage. natural: (S, J), the sources' shares as they come, by tokens and copies."""
    bases = [_base(stage, sources, natural[i]) for i, stage in enumerate(config.stages)]
    return [_course(stage, bases[max(0, i - 1)], bases[i], sources) for i, stage in enumerate(config.stages)]


def _base(stage: Stage, sources: list[str], natural: np.ndarray) -> np.ndarray:
    """Shares without transition and blend: those given; the rest goes to the other sources as they come."""
    given = stage.source_weights or {}
    named = {*given, *(stage.blend.sources if stage.blend else ())}
    others = np.where([name in named for name in sources], 0.0, natural)
    rest = max(0.0, 1 - sum(given[name] for name in sorted(given)))
    others = others * (rest / others.sum() if others.sum() > 0 and rest > 1e-9 else 0.0)
    return others + np.array([given.get(name, 0.0) for name in sources])


def _course(stage: Stage, before: np.ndarray, base: np.ndarray, sources: list[str]) -> Course:
    turn, late = stage.transition, 1 - stage.blend.last if stage.blend else 1.0
    knots = {(0.0, False), (1.0, stage.blend is not None), (turn, turn >= late)}  # (x, whether the blend has begun)
    if stage.blend:
        knots |= {(late, False), (late, True)} if late > 0 else {(0.0, True)}
        knots -= {(0.0, False)} if late <= 0 else set()
    rows = []
    for x, blended in sorted(knots):
        shares = before + (base - before) * (min(1.0, x / turn) if turn else 1.0)
        if blended and stage.blend:
            extra = np.array([stage.blend.sources.get(name, 0.0) for name in sources])
            shares = shares * (1 - extra.sum()) + extra
        rows.append(shares)
    return Course(np.array([x for x, _ in sorted(knots)]), np.array(rows))


def densities(course: Course, planned: np.ndarray) -> np.ndarray:
    """(K, J) values of each source's density at the knots: integral 1, and at every knot all sources together make
    the stage's even flow of tokens, as near to the course as what is planned of each source, (J,) tokens, allows.

    Found by iterative proportional fitting: rows are the knots' widths, columns what is planned.
    """
    total = planned.sum()
    flow = course.widths[:, None] * course.shares
    for _ in range(200):
        flow = flow * (course.widths * total / np.maximum(flow.sum(axis=1), 1e-300))[:, None]
        flow = flow * (planned / np.maximum(flow.sum(axis=0), 1e-300))[None]
    return flow / np.maximum(course.widths[:, None] * planned, 1e-300)
