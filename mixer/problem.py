"""What the planner has to solve, as arrays: targets that must be met, caps, and what is asked of sources and tiers."""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from mixer.allocate import largest_remainder
from mixer.config import CLASSES, MixConfig
from mixer.shares import Course, courses

Cells = list[dict[str, Any]]


@dataclass(frozen=True)
class Group:
    """A hard target: so many tokens of a stage, from documents of one length class (None: of any)."""

    stage: int
    length_class: str | None
    target: int


@dataclass(frozen=True)
class Problem:
    """S stages, C cells (sorted by source, tier and class), J sources; tokens are whole numbers.

    usable: (S, C) tokens. cap: (C,) copies of a document over all stages. copies: (C,) asked for in total.
    open: (S, C), where the stage may draw, whatever its class shares. groups: the hard targets; group: (S, C), the
    number of the one that a draw counts towards. source: (C,). shares: (S, J), asked for over the whole stage, the
    means of `courses`. asked: (S,), whether the stage asks for shares at all, or takes its sources as they come.
    """

    usable: np.ndarray
    cap: np.ndarray
    copies: np.ndarray
    open: np.ndarray
    groups: tuple[Group, ...]
    group: np.ndarray
    source: np.ndarray
    courses: tuple[Course, ...]
    shares: np.ndarray
    asked: np.ndarray

    @cached_property
    def targets(self) -> np.ndarray:
        return np.array([g.target for g in self.groups], np.int64)

    @cached_property
    def allowed(self) -> np.ndarray:
        """(S, C), where the stage may draw."""
        return self.open & (self.targets[self.group] > 0)

    @cached_property
    def tokens(self) -> np.ndarray:
        """(S,) the stages' tokens."""
        return np.bincount([g.stage for g in self.groups], self.targets, len(self.usable)).astype(np.int64)

    @cached_property
    def rate(self) -> np.ndarray:
        """(S, C): what a token drawn takes of its cell, in tokens of the stage that can use most of it; 0 or >= 1."""
        most = self.usable.max(axis=0, initial=0)
        return np.where(self.usable > 0, most / np.maximum(self.usable, 1), 0.0)

    @cached_property
    def room(self) -> np.ndarray:
        """(C,) tokens, of the cell's most usable stage, that the cap allows over all stages."""
        return self.cap * self.usable.max(axis=0, initial=0)


def build(cells: Cells, sources: list[str], config: MixConfig) -> Problem:
    """cells: those that may be trained on, sorted; sources: all names, sorted."""
    stages, number = config.stages, {name: j for j, name in enumerate(sources)}
    source = np.array([number[cell["source"]] for cell in cells], np.int64)
    usable = np.array([cell["usable"] for cell in cells], np.int64).reshape(len(cells), len(stages)).T
    copies = np.array([config.tiers[cell["tier"]].copies for cell in cells], np.float64)
    classes = np.array([CLASSES.index(cell["length_class"]) for cell in cells], np.int64)
    groups: list[Group] = []
    group = np.zeros_like(usable)
    for i, stage in enumerate(stages):
        group[i] = len(groups) + (classes if stage.shares else 0)
        if stage.shares is None:
            groups.append(Group(i, None, stage.tokens))
        else:
            shares = [Fraction(getattr(stage.shares, name)) for name in CLASSES]
            parts = largest_remainder(stage.tokens, shares)
            groups += [Group(i, name, part) for name, part in zip(CLASSES, parts, strict=True)]
    targets = np.array([g.target for g in groups], np.int64)
    course = courses(config, sources, _natural(usable * copies, group, targets, source, len(sources)))
    shares_SJ = np.array([c.mean for c in course])
    named = np.array([c.mean > 0 for c in courses(config, sources, np.ones((len(stages), len(sources))))])
    open_ = (usable > 0) & (copies > 0) & named[:, source]
    asked = np.array([bool(s.source_weights or s.blend or s.transition) for s in stages])
    cap = np.array([config.tiers[cell["tier"]].cap for cell in cells], np.int64)
    return Problem(usable, cap, copies, open_, tuple(groups), group, source, tuple(course), shares_SJ, asked)


def _natural(
    weights: np.ndarray, group: np.ndarray, targets: np.ndarray, source: np.ndarray, sources: int
) -> np.ndarray:
    """(S, J): the sources' shares where each class has its target and every document is drawn by its copies alone."""
    there = np.array([np.bincount(g, w, len(targets)) for g, w in zip(group, weights, strict=True)])
    scale = np.where(there > 0, targets / np.where(there > 0, there, 1.0), 0.0)
    scaled = weights * np.take_along_axis(scale, group, axis=1)
    by_source = np.array([np.bincount(source, row, sources) for row in scaled])
    return by_source / np.maximum(by_source.sum(axis=1, keepdims=True), 1e-300)
