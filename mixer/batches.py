"""A stage's global batches, in order: where a run is, how large its steps are, and which slices a rank takes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dataprep.storage import UserError
from mixer.reader import Batch, ShardLog


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


def global_batches(
    log: ShardLog,
    sizes: BatchSizes,
    state: Mapping[str, Any] | None = None,
    rank: int = 0,
    ranks: int = 1,
    rows: int = 1 << 40,
) -> Iterator[tuple[dict[str, Any], list[Batch]]]:
    """A rank's micro-batches of every global batch, and the state after it; the next are read while these are used.

    state: {plan, stage, step, cursor}, the fingerprint and name of what is read, the steps done and the next sequence:
    the same for any number of ranks. None: from the beginning. rows: most sequences of a micro-batch. Waits for the
    packer and ends with the stage, whose last step may be smaller; every rank finds the same steps without asking the
    others. Raises UserError where the log is of another plan or stage, or ends before the state. `log.close` stops the
    thread that reads ahead.
    """
    here: dict[str, Any] = {"plan": log.stage.plan, "stage": log.stage.stage}
    state = state or here | {"step": 0, "cursor": 0}
    step, start = state["step"], state["cursor"]
    for what, there in here.items():
        if state[what] != there:
            raise UserError(
                f"cannot resume at step {step}: the run reads {what} {state[what]}, {log.directory} holds {what} "
                f"{there}; give it the shards it began with, or start a new run"
            )
    if (ends := log.wait(start)) < start:
        raise UserError(f"cannot resume at sequence {start} of stage {state['stage']}: {log.directory} ends at {ends}")
    while (stop := min(start + sizes.at(start), log.wait(start + sizes.at(start)))) > start:
        mine = list(slices(start, stop, rank, ranks, rows))
        log.read_ahead([*mine, *slices(stop, stop + sizes.at(stop), rank, ranks, rows)])
        parts = [log.read(a, b) if a < b else Batch.masked(log.stage, 1) for a, b in mine]
        step, start = step + 1, stop
        yield here | {"step": step, "cursor": start}, parts
