"""A small job for the engine's tests: a map, an exchange and a global step. `python -m tests.jobs.toy ROOT WORKERS`."""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from dataprep.storage import Attempt, read_table
from jobs.engine import Engine, Step, Task

PARTITIONS, RANGES, ROWS = 6, 5, 200


def make(out: Attempt, number: int, pause: float, die: str) -> dict:
    """A table of numbers. Where the file `die` does not exist yet, create it and kill this worker in mid-write."""
    values = np.arange(ROWS, dtype=np.uint64) * np.uint64(7919) + np.uint64(number)
    time.sleep(pause)
    with out.file("half", ".bin") as path:
        Path(path).write_bytes(b"x" * 1000)
        if die and number == 2 and not Path(die).exists():
            Path(die).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    out.table("numbers", pa.table({"value": values, "partition": np.full(ROWS, number)}))
    return {"rows": ROWS}


def cut(path: str, pause: float) -> tuple[pa.Table, np.ndarray]:
    time.sleep(pause)
    table = read_table(path)
    return table, (table["value"].to_numpy() % RANGES).astype(np.int64)


def collect(out: Attempt, table: pa.Table, number: int, pause: float) -> dict:
    time.sleep(pause)
    table = table.sort_by([("value", "ascending"), ("partition", "ascending")])
    assert (table["value"].to_numpy() % RANGES == number).all()
    out.table("sorted", table)
    return {"rows": len(table)}


def total(out: Attempt, paths: list[str]) -> dict:
    rows = sum(len(read_table(p)) for p in paths)
    out.table("total", pa.table({"rows": [rows]}))
    return {"rows": rows}


def toy(engine: Engine, pause: float = 0.0, partitions: int = PARTITIONS, die: str = "") -> list:
    tasks = [Task(f"{n:05d}", {"number": str(n)}, (n, pause, die), 1 << 16) for n in range(partitions)]
    made = engine.map(Step("make", 1), make, tasks)
    cuts = [Task(c.key, {"numbers": c.fingerprint}, (c.path("numbers"), pause), c.bytes) for c in made]
    collected = engine.exchange(Step("collect", 1), cut, cuts, RANGES, collect, lambda r: (pause,))
    inputs = {c.key: c.fingerprint for c in collected}
    end = engine.once(Step("total", 1), total, Task("all", inputs, ([c.path("sorted") for c in collected],)))
    return [*made, *collected, end]


if __name__ == "__main__":
    with Engine(sys.argv[1], int(sys.argv[2])) as the_engine:
        toy(the_engine, float(sys.argv[3]) if len(sys.argv) > 3 else 0.0, die=sys.argv[4] if len(sys.argv) > 4 else "")
