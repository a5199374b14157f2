"""Reading a stage's shard log by global sequence number, also while it is still being written."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from dataprep.storage import Commit, UserError, arrow_file, filesystem, is_local, join, read_json
from mixer.shards import SEGMENT, SHARD, STORED, StageInfo, checksums, shard_key

__all__ = ["SEGMENT", "Batch", "ShardLog", "StageInfo"]

POLL_SECONDS = 0.05, 2.0  # from the first look to the slowest
AGAIN = "remove it and its commit, and pack again"
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Consecutive sequences. The arrays are the caller's to keep, but may be shared: do not write into them.

    tokens: (n, context) uint16 or uint32. segments: SEGMENT, in row order; `sequence` counts from 0 within the batch.
    """

    tokens: np.ndarray
    segments: np.ndarray


class ShardLog:
    """The sequences of one stage, numbered from 0 in training order.

    stage: what stage.json says. Any fsspec path. Not safe for several threads at once.
    """

    def __init__(self, directory: str):
        """Raises UserError where `directory` holds no stage."""
        self.directory = directory
        self.stage = StageInfo.load(directory)
        self._ends: list[int] = []  # sequences up to and with shard k, for the shards committed without a gap
        self._ended = False
        self._files: OrderedDict[int, tuple[str, pa.ipc.RecordBatchFileReader]] = OrderedDict()
        self._batches: OrderedDict[tuple[int, int], Batch] = OrderedDict()

    @property
    def ended(self) -> bool:
        """Whether the stage is complete."""
        if not self._ended:
            self._forget_listings()
            end = read_json(join(self.directory, "end.json"))
            if end is not None:
                self._ended = True
                self._ends = np.cumsum(end["shard_sequences"], dtype=np.int64).tolist()
        return self._ended

    def wait(self, sequences: int, timeout: float = 60.0) -> int:
        """Block until `sequences` are committed in order, or the stage has ended; return how many there are.

        timeout: seconds the packer's heartbeat may stand still. It is watched for change, not compared with this
        machine's clock. Raises UserError when the packer has failed or its heartbeat has stopped.
        """
        pause, longest = POLL_SECONDS
        last_beat: Any = None
        seen = time.monotonic()
        while (there := self._committed()) < sequences and not self.ended:
            beat = read_json(self._heartbeat) or {}
            if "failed" in beat:
                raise UserError(f"packing of stage {self.stage.stage} failed: {beat['failed']}; mend it and pack again")
            if beat != last_beat or self._committed() > there:
                last_beat, seen = beat, time.monotonic()
            elif time.monotonic() - seen > timeout:
                raise UserError(
                    f"stage {self.stage.stage}: sequence {sequences} is not there ({there} are) and the packer's "
                    f"heartbeat {self._heartbeat} has stood still for {timeout:g} s; start the packer again"
                )
            time.sleep(min(pause, timeout / 4))
            pause = min(1.5 * pause, longest)
        return self._committed()

    def read(self, start: int, stop: int) -> Batch:
        """Sequences [start, stop). Raises UserError where they are not there, or naming file and batch if damaged."""
        if not 0 <= start <= stop or (stop > self._length and stop > self._committed()):
            raise UserError(
                f"stage {self.stage.stage} has sequences 0..{self._length} at {self.directory}, not {start}..{stop}"
            )
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            shard_start = self._ends[shard - 1] if shard else 0
            if start < self._ends[shard]:
                number, skip = divmod(start - shard_start, self.stage.batch_rows)
                batch = self._batch(shard, number)
                part = _rows(batch, skip, min(len(batch.tokens), skip + stop - start))
                parts.append(part)
                start += len(part.tokens)
            if start >= self._ends[shard]:
                shard += 1
        return _concatenate(parts, self.stage)

    @property
    def _heartbeat(self) -> str:
        path = self.stage.heartbeat
        return path if not is_local(path) or path.startswith(("/", "file://")) else join(self.directory, path)

    @property
    def _length(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _forget_listings(self) -> None:
        """An object store's client may otherwise answer from an old listing."""
        if not is_local(self.directory):
            filesystem(self.directory)[0].invalidate_cache()

    def _committed(self) -> int:
        """Look for more shards; return the number of sequences committed without a gap."""
        while not self.ended and (commit := Commit.load(self.directory, shard_key(len(self._ends)))) is not None:
            self._ends.append(self._length + commit.aggregates["sequences"])
        return self._length

    def _batch(self, shard: int, number: int) -> Batch:
        return _cached(self._batches, (shard, number), 4, lambda: self._load(shard, number))

    def _load(self, shard: int, number: int) -> Batch:
        path, file = _cached(self._files, shard, 2, lambda: self._open(shard))
        try:
            arrow, stored = file.get_batch_with_custom_metadata(number)
            arrow.validate(full=True)
            batch = _decode(arrow)
            intact = checksums(batch.tokens, batch.segments) == {k.decode(): v.decode() for k, v in stored.items()}
        except (pa.ArrowException, OSError, ValueError, AttributeError):
            intact = False
        if not intact:
            raise UserError(f"{path}, batch {number}: damaged (checksum differs); {AGAIN}")
        return batch

    def _open(self, shard: int) -> tuple[str, pa.ipc.RecordBatchFileReader]:
        commit = Commit.load(self.directory, shard_key(shard))
        if commit is None:
            raise UserError(
                f"{self.directory}: the commit of shard {shard_key(shard)} is missing; pack the stage again"
            )
        path = commit.path(SHARD)
        try:
            return path, pa.ipc.open_file(arrow_file(path))
        except FileNotFoundError:
            raise UserError(f"{path} is missing though its commit is there; {AGAIN}") from None
        except (pa.ArrowException, OSError):
            raise UserError(f"{path} is damaged: no Arrow file any more; {AGAIN}") from None


def _decode(arrow: pa.RecordBatch) -> Batch:
    column = arrow.column("tokens")
    tokens = column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    lists = arrow.column("segments")
    counts = np.diff(lists.offsets.to_numpy())
    structs = lists.flatten()
    segments = np.zeros(len(structs), SEGMENT)
    for name in STORED:
        segments[name] = structs.field(name).to_numpy()
    segments["sequence"] = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(segments["length"])
    before = np.concatenate([[0], ends])[np.repeat(np.cumsum(counts) - counts, counts)]
    segments["start"] = ends - segments["length"] - before
    return Batch(tokens, segments)


def _rows(batch: Batch, first: int, last: int) -> Batch:
    low, high = np.searchsorted(batch.segments["sequence"], [first, last])
    segments = batch.segments[low:high].copy()
    segments["sequence"] -= first
    return Batch(batch.tokens[first:last], segments)


def _concatenate(parts: list[Batch], info: StageInfo) -> Batch:
    if not parts:
        return Batch(np.zeros((0, info.context), info.dtype), np.zeros(0, SEGMENT))
    if len(parts) == 1:
        return parts[0]
    before = 0
    for part in parts:
        part.segments["sequence"] += before
        before += len(part.tokens)
    return Batch(np.concatenate([p.tokens for p in parts]), np.concatenate([p.segments for p in parts]))


def _cached(cache: OrderedDict[Any, T], key: Any, size: int, make: Callable[[], T]) -> T:
    """The value at `key`, made if need be; the `size` last used are kept."""
    if key not in cache:
        cache[key] = make()
    cache.move_to_end(key)
    if len(cache) > size:
        cache.popitem(last=False)
    return cache[key]
