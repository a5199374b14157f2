"""Where each cell is cut: the places of its items in draw-hash order, and how far into them each stage draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mixer.config import CLASSES, MixConfig
from mixer.plan import StagePlan

# A cell's items lie on a line of its tokens, from 0 to 1, in the order of their draw hash. `knots` are the hashes where
# pieces of the line begin, `cumulative` (one more) where they lie; in an `exact` cell a piece is one item. `copies`: of
# each document, before the first stage and after each one; an item whose middle lies at u is drawn
# floor(after + u) - floor(before + u) times.
PLACES = pa.schema(
    [
        ("source", pa.string()),
        ("tier", pa.string()),
        ("length_class", pa.string()),
        ("held_out", pa.bool_()),
        ("cap", pa.int32()),
        ("exact", pa.bool_()),
        ("knots", pa.list_(pa.uint32())),
        ("cumulative", pa.list_(pa.float64())),
        ("copies", pa.list_(pa.float64())),
    ]
)


@dataclass
class _Line:
    """A cell's pieces. A position counts pieces from the line's end, once for every copy; `cut` says how far we are."""

    knots: np.ndarray
    tokens: np.ndarray  # of each piece
    usable: list[np.ndarray]  # by stage: tokens up to each position of the first copy, from 0
    exact: bool
    cap: int
    cut: float = 0.0

    def amount(self, stage: int, position: float) -> float:
        copies, rest = divmod(position, len(self.tokens))
        sums = self.usable[stage]
        return float(copies * sums[-1] + np.interp(rest, np.arange(len(sums)), sums))

    def gain(self, stage: int, cut: float) -> float:
        """Tokens that moving the cut there adds."""
        return self.amount(stage, cut) - self.amount(stage, self.cut)

    def position(self, sums: np.ndarray, amount: float) -> float:
        """Where `amount` tokens are reached; in an exact cell the boundary between items that is nearest."""
        if sums[-1] <= 0:
            return self.cut
        copies, rest = divmod(max(0.0, amount), sums[-1])
        place = float(np.interp(rest, sums, np.arange(len(sums))))
        if self.exact:
            place = min(np.floor(place), np.ceil(place), key=lambda p: abs(sums[int(p)] - rest))
        return float(copies * len(self.tokens) + place)

    def copies(self) -> float:
        """Copies of each document, on average in tokens, up to the cut."""
        whole, rest = divmod(self.cut, len(self.tokens))
        return float(whole + 1 - np.interp(len(self.tokens) - rest, np.arange(len(self.tokens) + 1), self.cumulative()))

    def cumulative(self) -> np.ndarray:
        sums = np.concatenate([[0], np.cumsum(self.tokens, dtype=np.float64)])
        return sums / max(1, sums[-1])


def places(
    cells: list[dict[str, Any]], stages: Sequence[StagePlan], held_out: StagePlan, config: MixConfig
) -> pa.Table:
    """The table PLACES for an inventory's cells (of `add_inventories`) and the stages planned from them."""
    splits = [stage.long_documents == "split" for stage in config.stages]
    rows: list[dict[str, Any]] = [{} for _ in cells]
    for held, planned in ((False, stages), (True, [held_out])):
        numbers = [n for n, cell in enumerate(cells) if cell["held_out"] == held]
        lines = [
            _line(cells[n], [True] if held else splits, 1 if held else config.tiers[cells[n]["tier"]].cap)
            for n in numbers
        ]
        cuts = [[0.0] for _ in lines]
        for s, stage in enumerate(planned):
            for length_class in CLASSES:
                _cut_class(
                    lines, s, stage, [i for i, c in enumerate(stage.cells) if c.length_class == length_class], planned
                )
            for cut, line in zip(cuts, lines, strict=True):
                cut.append(line.copies())
        for n, line, cut in zip(numbers, lines, cuts, strict=True):
            names = {name: cells[n][name] for name in ("source", "tier", "length_class", "held_out")}
            about = {"cap": line.cap, "exact": line.exact, "knots": line.knots, "cumulative": line.cumulative()}
            rows[n] = names | about | {"copies": cut}
    return pa.Table.from_pylist(rows, schema=PLACES)


def _line(cell: dict[str, Any], splits: list[bool], cap: int) -> _Line:
    """splits: of each stage, whether it packs all tokens of a document, however long."""
    places, tokens, *taken = np.array(cell["pieces"], np.int64)
    rest = iter(taken)
    usable = [tokens if split else next(rest) for split in splits]
    sums = [np.concatenate([[0.0], np.cumsum(u[::-1])]) for u in usable]
    return _Line(places, tokens, sums, cell["exact"], cap)


def _cut_class(lines: list[_Line], s: int, stage: StagePlan, cells: list[int], stages: Sequence[StagePlan]) -> None:
    """Cut one stage's cells of one class: each where it comes nearest to its plan, then some an item or two further.

    A cell can be cut between its items only (one too large to list, where its buckets' mean puts it), so it misses by
    up to half an item. Moving single cuts, the one that helps most first, makes the sum of these misses small.
    """
    before = {c: lines[c].cut for c in cells if stage.cells[c].planned}
    most = {c: _limit(lines[c], stage.cells[c].copies_after, stages[-1].cells[c].copies_after) for c in before}
    left = 0.0
    for c in before:
        line, planned = lines[c], stage.cells[c].planned
        end = line.position(line.usable[s], line.amount(s, line.cut) + planned)
        end = max(line.cut, min(end, most[c]))
        left += planned - line.gain(s, end)
        line.cut = end

    def moves(c: int) -> list[tuple[float, int, int]]:
        """(tokens more, cell, items more)"""
        cut, steps = lines[c].cut, (-2, -1, 1, 2) if lines[c].exact else ()
        within = [step for step in steps if before[c] <= cut + step <= most[c]]
        return [(lines[c].gain(s, cut + step), c, step) for step in within]

    possible = {c: moves(c) for c in before}
    while tries := [(abs(left - more), c, step) for found in possible.values() for more, c, step in found]:
        best, c, step = min(tries)
        if best >= abs(left):
            break
        left -= lines[c].gain(s, lines[c].cut + step)
        lines[c].cut += step
        possible[c] = moves(c)


def _limit(line: _Line, after: float, last: float) -> float:
    """How far a stage may draw from a cell: up to its cap, less what the plan gives to later stages."""
    sums = np.concatenate([[0.0], np.cumsum(line.tokens[::-1])])
    place = line.position(sums, min(line.cap, after + line.cap - last) * sums[-1])
    return min(place, float(line.cap * len(line.tokens)))
