"""A stage's global batches, in order: where a run is, how large its steps are, which slice a rank takes, read ahead."""

import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dataprep.storage import UserError
from mixer.reader import Batch, ShardLog

AHEAD = 2  # steps that wait in the queue


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


def slices(start: int, stop: int, rank: int, ranks: int, rows: int) -> Iterator[tuple[int, int]]:
    """This rank's slices of the global batch [start, stop), one per micro-batch of at most `rows` sequences.

    Every rank gets as many; one left without a sequence of its own gets an empty slice.
    """
    for first in range(start, stop, rows * ranks):
        n = min(rows * ranks, stop - first)
        yield first + n * rank // ranks, first + n * (rank + 1) // ranks


def read_slices(
    log: ShardLog, start: int, stop: int, rank: int = 0, ranks: int = 1, rows: int = 1 << 62
) -> Iterator[Batch]:
    """This rank's micro-batches of the global batch [start, stop); for an empty slice, one masked sequence."""
    for a, b in slices(start, stop, rank, ranks, rows):
        yield log.read(a, b) if a < b else Batch.masked(log.stage, 1)


@dataclass(frozen=True)
class Step:
    """One global batch: sequences [start, stop). parts: this rank's micro-batches. after: the place behind it."""

    start: int
    stop: int
    parts: list[Batch]
    after: Place


class Batches:
    """A rank's share of a stage's global batches from `place` on, read by a background thread.

    Iterating waits for the packer and ends with the stage, whose last step may be smaller. Every rank finds the same
    steps without asking the others. An error in the thread is raised where the next step is asked for. The log is the
    thread's until `close`, which a `with` block does.
    """

    def __init__(
        self,
        log: ShardLog,
        sizes: BatchSizes,
        place: Place | None = None,
        rank: int = 0,
        ranks: int = 1,
        rows: int = 1 << 62,
        timeout: float = 60.0,
    ):
        """rows: most sequences of a micro-batch. timeout: as `ShardLog.wait`'s. Raises UserError as `Place.check`."""
        self.place = place or Place(log.stage.plan, log.stage.stage)
        self.place.check(log)
        self._closed = threading.Event()
        self._queue: queue.Queue[Step | BaseException | None] = queue.Queue(AHEAD)
        work = self._steps(log, sizes, self.place, (rank, ranks, rows), timeout)
        self._thread = threading.Thread(target=self._run, args=(work,), name="read ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Step:
        """The next step; `place` is then the one after it."""
        if self._closed.is_set():
            raise StopIteration
        found = self._queue.get()
        if isinstance(found, Step):
            self.place = found.after
            return found
        self.close()
        raise found or StopIteration

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        self._closed.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)  # it may be waiting for room
            except queue.Empty:
                continue

    def _run(self, work: Iterator[Step]) -> None:
        try:
            for step in work:
                self._queue.put(step)
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def _steps(
        self, log: ShardLog, sizes: BatchSizes, place: Place, slice_: tuple[int, int, int], timeout: float
    ) -> Iterator[Step]:
        while not self._closed.is_set():
            wanted = place.cursor + sizes.at(place.cursor)
            stop = min(wanted, log.wait(wanted, timeout, self._closed.is_set))
            if stop == place.cursor or self._closed.is_set():
                return
            parts = list(read_slices(log, place.cursor, stop, *slice_))
            start, place = place.cursor, Place(place.plan, place.stage, place.step + 1, stop)
            yield Step(start, stop, parts, place)
