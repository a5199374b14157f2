"""The exchange: rows of all partitions regrouped by range, through storage, in few large reads.

Each cut task writes one file whose rows lie sorted by range, one slice (Arrow record batch) per range. Where
partitions times ranges would make slices small, ranges are cut coarsely first and each coarse range again, so that
the mean slice stays at MIN_SLICE or more however many partitions and ranges there are.
"""

import json
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

from dataprep import storage
from dataprep.storage import Attempt, UserError

if TYPE_CHECKING:
    from jobs.engine import Engine, Task

MIN_SLICE = 4 << 20  # bytes: below this, storage spends its time on requests
TASK_BYTES = 1 << 30  # bytes that one re-cutting task holds; less than twice that
FEW_SLICES = 4096  # not worth a second pass, whatever their size
RANGE = "_range"


def strides(partitions: int, ranges: int, total_bytes: int) -> list[int]:
    """How many final ranges one slice spans at each level of the exchange; the last is 1."""
    per_partition = total_bytes // max(1, partitions)
    first = min(ranges, max(1, per_partition // MIN_SLICE))
    if first >= ranges or partitions * ranges <= FEW_SLICES:
        return [1]
    levels = [math.ceil(ranges / first)]
    passes = max(1, math.ceil(math.log(levels[0], TASK_BYTES // MIN_SLICE)))
    factor = math.ceil(levels[0] ** (1 / passes))
    while levels[-1] > 1:
        levels.append(math.ceil(levels[-1] / factor))
    return levels


def together(files: int, mean: int) -> int:
    """How many of a range's files, whose slices have `mean` bytes, one re-cutting task reads."""
    return max(2, math.ceil(files / max(1, files * mean // TASK_BYTES)))


def write_slices(attempt: Attempt, table: pa.Table, ranges: np.ndarray, stride: int) -> dict[str, Any]:
    """Write a table cut into slices of `stride` ranges; the file's schema metadata lists the slices it has."""
    coarse = np.asarray(ranges, np.int64) // stride
    counts = np.bincount(coarse)
    small = coarse.astype(np.uint16) if len(counts) <= 1 << 16 else coarse  # 16 bits are sorted by radix
    order = np.argsort(small, kind="stable").astype(np.int32 if len(small) < 1 << 31 else np.int64)  # taken faster
    present = np.flatnonzero(counts)
    counts = counts[present]
    starts = np.cumsum(counts) - counts
    if RANGE not in table.column_names:
        table = table.append_column(RANGE, pa.array(np.asarray(ranges, np.uint32)))
    table = table.combine_chunks().take(pa.array(order)).combine_chunks()
    listed = json.dumps(present.tolist())
    schema = table.schema.with_metadata({"slices": listed, "xxh3": head_checksum(table.schema, listed)})
    table = table.replace_schema_metadata(schema.metadata)
    pieces = [table.slice(start, count) for start, count in zip(starts, counts, strict=True)]
    with attempt.file("slices", ".arrow") as path:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(path, schema, options=options) as writer:
            for number, piece in zip(present, pieces, strict=True):
                batch = piece.to_batches()[0]
                writer.write_batch(batch, custom_metadata={"xxh3": checksum(batch, int(number))})
    return {"rows": len(order)}


def head_checksum(schema: pa.Schema, listed: str) -> str:
    return xxhash.xxh3_64_hexdigest(schema.remove_metadata().serialize().to_pybytes() + listed.encode())


def checksum(batch: pa.RecordBatch, number: int) -> str:
    """Over the values of slice `number` as they are serialized: the same before and after a file."""
    return xxhash.xxh3_64_hexdigest(batch.replace_schema_metadata(None).serialize(), seed=number)


def read_slices(paths: Sequence[str], coarse: int) -> pa.Table:
    """The rows of one slice from many files, in the files' order. UserError where one is not what was written."""
    batches, schema = [], None
    for path in paths:
        try:
            with storage.arrow_file(path) as file:
                reader = pa.ipc.open_file(file)
                schema = reader.schema
                listed = schema.metadata[b"slices"].decode()
                whole = head_checksum(schema, listed) == schema.metadata[b"xxh3"].decode()
                if whole and coarse in (slices := json.loads(listed)):
                    batch, about = reader.get_batch_with_custom_metadata(slices.index(coarse))
                    whole = checksum(batch, coarse) == about["xxh3"].decode()
                    batches.append(batch)
        except FileNotFoundError:
            raise
        except (pa.ArrowException, ValueError, LookupError, TypeError, OSError):  # for bytes that Arrow has not written
            whole = False
        if not whole:
            raise UserError(f"{path} is damaged: a checksum differs; remove it and run the same command again")
    if schema is None:
        raise ValueError("an exchange without partitions has no rows and no schema")
    return pa.Table.from_batches([b.replace_schema_metadata(None) for b in batches], schema.remove_metadata())


def cut_partition(attempt: Attempt, cut: Callable, args: tuple, stride: int) -> dict[str, Any]:
    table, ranges = cut(*args)
    return write_slices(attempt, table, ranges, stride)


def cut_again(attempt: Attempt, paths: list[str], coarse: int, stride: int) -> dict[str, Any]:
    table = read_slices(paths, coarse)
    return write_slices(attempt, table, table[RANGE].to_numpy(), stride)


def reduce_range(attempt: Attempt, reduce: Callable, paths: list[str], args: tuple) -> dict[str, Any]:
    table = read_slices(paths, args[0])
    return reduce(attempt, table.drop_columns([RANGE]), *args)


def regroup(
    engine: "Engine",
    name: str,
    directory: str,
    cut: Callable,
    tasks: Sequence["Task"],
    ranges: int,
    reduce: Callable,
    outputs: Sequence["Task"],
) -> None:
    """Cut, re-cut as often as needed, reduce into `outputs`. The slices stay: the engine removes them."""
    from jobs.engine import Task

    total = sum(t.bytes for t in tasks)
    levels = strides(len(tasks), ranges, total)
    slices = storage.join(directory, "slices")
    first = [Task(t.key, t.inputs, (cut, t.args, levels[0]), t.bytes) for t in tasks]
    commits = engine.complete(f"{name} (cut)", storage.join(slices, f"0-{ranges}-{levels[0]}"), cut_partition, first)
    files = {c: [commit.path("slices") for commit in commits] for c in range(math.ceil(ranges / levels[0]))}
    inputs = outputs[0].inputs if outputs else {}
    for level, (above, stride) in enumerate(pairwise(levels), 1):
        mean = max(1, total // max(1, len(commits) * len(files)))
        again = [
            Task(f"{c:05d}-{g:05d}", inputs, (paths[i : i + group], c, stride), mean * len(paths[i : i + group]))
            for c, paths in files.items()
            for group in [together(len(paths), mean)]
            for g, i in enumerate(range(0, len(paths), group))
        ]
        commits = engine.complete(
            f"{name} (cut {level})", storage.join(slices, f"{level}-{ranges}-{stride}"), cut_again, again
        )
        made: dict[int, list[str]] = {}
        for task, commit in zip(again, commits, strict=True):
            coarse = task.args[1]
            for finer in range(coarse * above // stride, math.ceil(min(ranges, (coarse + 1) * above) / stride)):
                made.setdefault(finer, []).append(commit.path("slices"))
        files = made
    final = [Task(t.key, t.inputs, (reduce, files[r], t.args), t.bytes) for r, t in enumerate(outputs)]
    engine.complete(name, directory, reduce_range, final)
