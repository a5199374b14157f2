"""Verifying a stage's shards, batch by batch: what is damaged goes into quarantine, where readers will not miss it."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from dataprep import storage
from dataprep.storage import Commit, join
from mixer.reader import Damaged, ShardLog
from mixer.shards import QUARANTINE, SHARD, shard_key


def verify(directory: str) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(batches, entries of quarantine.json) of every committed shard in order; several are read at once.

    Raises UserError where the directory holds no stage.
    """
    log = ShardLog(directory)
    log.wait(0)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda shard: verify_shard(log, shard), range(log.shards))


def verify_shard(log: ShardLog, shard: int) -> tuple[int, list[dict[str, Any]]]:
    """(batches, an entry for each damaged one)."""
    start, stop = log.span(shard)
    batches = -(-(stop - start) // log.stage.batch_rows)
    opened = lru_cache(1)(log.open)
    damaged = []
    for number in range(batches):
        try:
            opened(shard).batch(number, log.rows(shard, number))
        except Damaged as error:
            first = start + number * log.stage.batch_rows
            entry = {"shard": shard, "batch": number, "file": _name(log.directory, shard), "why": error.why}
            damaged.append(entry | {"first": first, "sequences": log.rows(shard, number)})
    return batches, damaged


def quarantine(directory: str, entries: list[dict[str, Any]]) -> None:
    """Write quarantine.json; where nothing is damaged (any more), there is none."""
    path = join(directory, QUARANTINE)
    if entries:
        storage.ensure_json(path, {"batches": entries})
    else:
        storage.remove(path)


def _name(directory: str, shard: int) -> str:
    commit = Commit.load(directory, shard_key(shard))
    return commit.files[SHARD]["name"] if commit else f"{shard_key(shard)}{storage.COMMIT}"
