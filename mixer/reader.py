"""Reading a stage's shard log by global sequence number, also while it is still being written."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import pyarrow as pa

from dataprep.storage import Commit, UserError, arrow_file, filesystem, is_local, join, read_json
from mixer.cache import ShardCache
from mixer.shards import HEARTBEAT, QUARANTINE, SEGMENT, SHARD, STORED, StageInfo, checksums, read_end, shard_key

__all__ = ["SEGMENT", "Batch", "Damaged", "ShardLog", "StageInfo"]

POLL_SECONDS = 0.05, 2.0  # from the first look to the slowest
REQUESTS = 32  # commits that are asked for at once
MOST_COMMITS = 512  # ... in one round
MOST_AHEAD = 64  # ranges that wait, read, for whoever asked for them
REMOTE_BLOCK = 1 << 20  # bytes that are read ahead from an object store, where no cache keeps whole shards
AGAIN = "remove it and its commit, and pack again"


@dataclass(frozen=True)
class Batch:
    """Consecutive sequences. The arrays are the caller's to keep, but may be shared: do not write into them.

    tokens: (n, context) uint16 or uint32. segments: SEGMENT, in row order; `sequence` counts from 0 within the batch.
    """

    tokens: np.ndarray
    segments: np.ndarray

    @classmethod
    def masked(cls, info: StageInfo, sequences: int) -> "Batch":
        """Sequences without a document: all padding, which counts for nothing."""
        eos = np.full((1, info.context), info.eos, info.dtype)
        return cls(np.broadcast_to(eos, (sequences, info.context)), np.zeros(0, SEGMENT))


class Damaged(UserError):
    """A shard, or one of its batches, that is not what was written. why: in a few words."""

    def __init__(self, message: str, why: str = ""):
        super().__init__(message)
        self.why = why


class ShardLog:
    """The sequences of one stage, numbered from 0 in training order.

    stage: what stage.json says. Any fsspec path. `read_ahead` starts a thread; otherwise for one thread at a time.
    """

    def __init__(self, directory: str, quarantined: Literal["stop", "mask"] = "stop", cache: ShardCache | None = None):
        """quarantined: whether sequences in quarantine.json are an error or come fully masked. cache: of remote shards.

        Raises UserError where `directory` holds no stage.
        """
        self.directory = directory
        self.stage = StageInfo.load(directory)
        self._cache = cache
        self._mask = quarantined == "mask"
        listed = (read_json(join(directory, QUARANTINE), batches=list) or {"batches": []})["batches"]
        self._quarantine = {(entry["shard"], entry["batch"]): entry for entry in listed}
        self._ends: list[int] = []  # sequences up to and with shard k, for the shards committed without a gap
        self._ended = False
        self._file = lru_cache(2)(self.open)
        self._load = lru_cache(4)(lambda shard, batch: self._file(shard).batch(batch, self.rows(shard, batch)))
        self._reading = threading.Lock()  # held by who uses the two above
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}
        self._thread: ThreadPoolExecutor | None = None

    @property
    def ended(self) -> bool:
        """Whether the stage is complete."""
        if not self._ended and (end := read_end(self.directory)) is not None:
            self._ended = True
            self._ends = np.cumsum(end["shard_sequences"], dtype=np.int64).tolist()
        return self._ended

    def wait(self, sequences: int, timeout: float = 60.0) -> int:
        """Block until `sequences` are committed in order, or the stage has ended; return how many there are.

        timeout: seconds the packer's heartbeat may stand still. It is watched for change, not compared with this
        machine's clock. Raises UserError when the packer has failed or its heartbeat has stopped.
        """
        pause, longest = POLL_SECONDS
        heartbeat, last = join(self.directory, HEARTBEAT), None
        while (there := self._committed()) < sequences and not self.ended:
            beat = read_json(heartbeat) or {}
            if "failed" in beat:
                raise UserError(f"packing of stage {self.stage.stage} failed: {beat['failed']}; mend it and pack again")
            if (beat, there) != last:
                last, seen = (beat, there), time.monotonic()
            elif time.monotonic() - seen > timeout:
                raise UserError(
                    f"stage {self.stage.stage}: sequence {sequences} is not there ({there} are) and the packer's "
                    f"heartbeat {heartbeat} has stood still for {timeout:g} s; start the packer again"
                )
            time.sleep(min(pause, timeout / 4))
            pause = min(1.5 * pause, longest)
        return self._committed()

    def read(self, start: int, stop: int) -> Batch:
        """Sequences [start, stop). Raises UserError where they are not there; Damaged, naming file and batch."""
        if not 0 <= start <= stop or (stop > self._length and stop > self._committed()):
            raise UserError(
                f"stage {self.stage.stage} has sequences 0..{self._length} at {self.directory}, not {start}..{stop}"
            )
        ahead = self._ahead.pop((start, stop), None)
        return ahead.result() if ahead else self._read(start, stop)

    def read_ahead(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say which ranges will be read next, in order: a thread begins with those that are committed.

        What was read for earlier calls and is not among them is forgotten. A damaged batch is told to who reads it.
        """
        kept = {span: ahead for span, ahead in self._ahead.items() if span in ranges}
        for span in self._ahead.keys() - kept:
            self._ahead[span].cancel()
        self._ahead = kept
        for start, stop in ranges[:MOST_AHEAD]:
            if start < stop <= self._length and (start, stop) not in kept:
                self._thread = self._thread or ThreadPoolExecutor(1, "read ahead")
                kept[start, stop] = self._thread.submit(self._read, start, stop)

    def close(self) -> None:
        """Stop the thread that reads ahead."""
        self._ahead = {}
        if self._thread:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None

    def _read(self, start: int, stop: int) -> Batch:
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            shard_start, shard_stop = self.span(shard)
            if start < shard_stop:
                number, skip = divmod(start - shard_start, self.stage.batch_rows)
                with self._reading:
                    batch = self._batch(shard, number)
                part = _rows(batch, skip, min(len(batch.tokens), skip + stop - start))
                parts.append(part)
                start += len(part.tokens)
            if start >= shard_stop:
                shard += 1
        return _concatenate(parts) if parts else Batch.masked(self.stage, 0)

    @property
    def shards(self) -> int:
        """How many shards are committed without a gap, as far as anybody has looked."""
        return len(self._ends)

    def span(self, shard: int) -> tuple[int, int]:
        """The sequences [start, stop) of a shard."""
        return self._ends[shard - 1] if shard else 0, self._ends[shard]

    def rows(self, shard: int, number: int) -> int:
        """How many sequences a shard's batch has."""
        start, stop = self.span(shard)
        return min(self.stage.batch_rows, stop - start - number * self.stage.batch_rows)

    def open(self, shard: int) -> "ShardFile":
        """A shard's file. Raises Damaged where it cannot be read."""
        commit = Commit.load(self.directory, shard_key(shard))
        if commit is None:
            where = f"{self.directory}: the commit of shard {shard_key(shard)} is missing"
            raise Damaged(f"{where}; pack the stage again", "no commit")
        return ShardFile(commit, self.stage, self._cache)

    @property
    def _length(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _committed(self) -> int:
        """Look for more shards; return the number of sequences committed without a gap.

        Asks for one commit, then for twice as many at once, and so on: a log of thousands takes a few round trips.
        """
        count = 1
        while not self.ended:
            keys = [shard_key(k) for k in range(self.shards, self.shards + count)]
            with ThreadPoolExecutor(min(count, REQUESTS)) as pool:
                found = list(pool.map(lambda key: Commit.load(self.directory, key), keys))
            there = found.index(None) if None in found else count
            for commit in found[:there]:
                assert commit is not None
                self._ends.append(self._length + commit.aggregates["sequences"])
            if there < count:
                break
            count = min(2 * count, MOST_COMMITS)
        return self._length

    def _batch(self, shard: int, number: int) -> Batch:
        if entry := self._quarantine.get((shard, number)):
            if self._mask:
                return Batch.masked(self.stage, self.rows(shard, number))
            raise Damaged(
                f"{join(self.directory, entry['file'])}, batch {number}: in quarantine ({entry['why']}), sequences "
                f"{entry['first']}..{entry['first'] + entry['sequences']}; pack the shard again and verify, or set "
                "train.quarantined to mask to go on without them",
                entry["why"],
            )
        return self._load(shard, number)


class ShardFile:
    """The record batches of one shard, each verified when it is read. Safe for several threads."""

    def __init__(self, commit: Commit, stage: StageInfo, cache: ShardCache | None = None):
        """Raises Damaged where the file is missing or no Arrow file."""
        self.path = commit.path(SHARD)
        self._commit, self._stage = commit, stage
        self._cache = None if is_local(self.path) else cache
        self._file = self._open()

    def batch(self, number: int, rows: int) -> Batch:
        """Batch `number`, which must have `rows` sequences. Raises Damaged."""
        if (batch := self._read(number, rows)) is None and self._cache is not None:
            self._cache.discard(self._commit, SHARD)  # is it only the copy that is damaged?
            self._file = self._open()
            batch = self._read(number, rows)
        if batch is None:
            raise Damaged(
                f"{self.path}, batch {number}: damaged (checksum differs); {AGAIN}, or put it into quarantine with "
                "jobs/shards.py DIRECTORY verify",
                "checksum differs",
            )
        return batch

    def _read(self, number: int, rows: int) -> Batch | None:
        """None where it is damaged."""
        try:
            arrow, stored = self._file.get_batch_with_custom_metadata(number)
            arrow.validate(full=True)
            batch = _decode(arrow)
            shape_fits = batch.tokens.shape == (rows, self._stage.context) and batch.tokens.dtype == self._stage.dtype
            intact = checksums(batch.tokens, batch.segments) == {k.decode(): v.decode() for k, v in stored.items()}
        except (pa.ArrowException, ValueError, AttributeError, KeyError):
            return None
        except OSError as error:
            if error.errno:  # the disk or the network, not the content
                raise
            return None
        return batch if intact and shape_fits else None

    def _open(self) -> pa.ipc.RecordBatchFileReader:
        try:
            # One thread decompresses: the others are the trainer's.
            return pa.ipc.open_file(self._source(), options=pa.ipc.IpcReadOptions(use_threads=False))
        except FileNotFoundError:
            raise Damaged(f"{self.path} is missing though its commit is there; {AGAIN}", "no file") from None
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise Damaged(f"{self.path} is damaged: no Arrow file any more; {AGAIN}", "no Arrow file") from None

    def _source(self) -> pa.NativeFile:
        if is_local(self.path):
            return arrow_file(self.path)
        if self._cache is not None:
            return self._cache.open(self._commit, SHARD)
        fs, name = filesystem(self.path)
        fs.invalidate_cache()  # of listings older than the shard
        return pa.PythonFile(fs.open(name, "rb", block_size=REMOTE_BLOCK), mode="r")


def _decode(arrow: pa.RecordBatch) -> Batch:
    # By DLPack, without copies; `to_numpy` would import pandas where it is installed: 30 MB and half a second.
    column = arrow.column("tokens")
    tokens = np.from_dlpack(column.flatten()).reshape(len(column), column.type.list_size)
    lists = arrow.column("segments")
    counts = np.diff(np.from_dlpack(lists.offsets))
    structs = lists.flatten()
    segments = np.zeros(len(structs), SEGMENT)
    for name in STORED:
        segments[name] = np.from_dlpack(structs.field(name))
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


def _concatenate(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    before = 0
    for part in parts:
        part.segments["sequence"] += before
        before += len(part.tokens)
    return Batch(np.concatenate([p.tokens for p in parts]), np.concatenate([p.segments for p in parts]))
