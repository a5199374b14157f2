"""A stage's global batches, in order: where a run is, how large its steps are, and which slices a rank takes."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dataprep.storage import UserError
from mixer.reader import Batch, ShardLog


@dataclass(frozen=True)
class Place:
    """Where a run is in a stage: small enough to be read in any checkpoint. The same on every number of ranks.

    plan: the stage's plan fingerprint. step: steps done in this stage. cursor: the next sequence.
    """

    plan: str
    stage: str
    step: int = 0
    cursor: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Place":
        names = [f.name for f in fields(cls)]
        if not isinstance(value, dict) or set(value) != set(names):
            raise UserError(f"a place in the data has {', '.join(names)}; this is {value!r}: take it from a checkpoint")
        return cls(**value)

    def check(self, log: ShardLog) -> None:
        """Raises UserError where the log is of another plan or stage, or shorter than this place."""
        for what, mine, theirs in (("stage", self.stage, log.stage.stage), ("plan", self.plan, log.stage.plan)):
            if mine != theirs:
                raise UserError(
                    f"cannot resume at step {self.step}: the run reads {what} {mine}, {log.directory} holds {what} "
                    f"{theirs}; give it the shards it began with, or start a new run"
                )
        if (there := log.wait(self.cursor)) < self.cursor:
            raise UserError(
                f"cannot resume at sequence {self.cursor} of stage {self.stage}: {log.directory} ends at {there}"
            )


@dataclass(frozen=True)
class BatchSizes:
    """How many sequences a step takes: a function of where it begins, so that it can be foretold and asked about.

    context: tokens of a sequence. tokens: of a global batch, rounded up to sequences. marks: tokens from which on ->
    tokens of a batch then (warm-up). They count from the run's beginning: `before` in the stages before this one, then
    sequences x context.
    """

    context: int
    tokens: int
    marks: Mapping[int, int] = field(default_factory=dict)
    before: int = 0

    def at(self, cursor: int) -> int:
        """Sequences of the step that begins at sequence `cursor`."""
        passed = [mark for mark in self.marks if mark <= self.before + cursor * self.context]
        return -(-(self.marks[max(passed)] if passed else self.tokens) // self.context)

    def steps(self, sequences: int, cursor: int = 0) -> Iterator[tuple[int, int]]:
        """The steps [start, stop) of a stage that has so many sequences; the last may be smaller."""
        while cursor < sequences:
            start, cursor = cursor, min(sequences, cursor + self.at(cursor))
            yield start, cursor


def slices(start: int, stop: int, rank: int, ranks: int, rows: int, together: int = 1) -> Iterator[tuple[int, int]]:
    """This rank's slices of the global batch [start, stop), one per micro-batch of at most `rows` sequences.

    Every rank gets as many; one left without a sequence of its own gets an empty slice. Runs of `together` sequences,
    counted from `start`, are not divided (rows: a multiple of it).
    """
    for first in range(start, stop, rows * ranks):
        last = min(first + rows * ranks, stop)
        runs = -(-(last - first) // together)
        a, b = (min(first + runs * r // ranks * together, last) for r in (rank, rank + 1))
        yield a, b


@dataclass(frozen=True)
class Step:
    """One global batch: sequences [start, stop). parts: this rank's micro-batches. after: the place behind it."""

    start: int
    stop: int
    parts: list[Batch]
    after: Place


class Batches:
    """A rank's share of a stage's global batches from `place` on, the next one read while this one is used.

    Iterating waits for the packer and ends with the stage, whose last step may be smaller. Every rank finds the same
    steps without asking the others. `close`, which a `with` block does, stops the log's thread.
    """

    def __init__(
        self,
        log: ShardLog,
        sizes: BatchSizes,
        place: Place | None = None,
        rank: int = 0,
        ranks: int = 1,
        rows: int = 1 << 40,
        timeout: float = 60.0,
    ):
        """rows: most sequences of a micro-batch. timeout: as `ShardLog.wait`'s. Raises UserError as `Place.check`."""
        self.place = place or Place(log.stage.plan, log.stage.stage)
        self.place.check(log)
        self._log, self._sizes, self._timeout = log, sizes, timeout
        self._rank, self._ranks, self._rows = rank, ranks, rows

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Step:
        """The next step; `place` is then the one after it."""
        log, start = self._log, self.place.cursor
        wanted = start + self._sizes.at(start)
        stop = min(wanted, log.wait(wanted, self._timeout))
        if stop == start:
            raise StopIteration
        mine = self._slices(start, stop)
        log.read_ahead([*mine, *self._slices(stop, stop + self._sizes.at(stop))])
        parts = [log.read(a, b) if a < b else Batch.masked(log.stage, 1) for a, b in mine]
        self.place = Place(self.place.plan, self.place.stage, self.place.step + 1, stop)
        return Step(start, stop, parts, self.place)

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._log.close()

    def _slices(self, start: int, stop: int) -> list[tuple[int, int]]:
        return list(slices(start, stop, self._rank, self._ranks, self._rows))
