"""The order test: a training read killed at random steps and resumed on 1, 2, 3 and 8 ranks reads the same batches.

Real reader processes, one per rank, write down what they read - a digest of every sequence's tokens and segments - and
after each step their place in the data. They are ended with SIGKILL; others, on another number of ranks, go on from
that place. The global batches of all of them must be those of an undisturbed run: the same multiset, the same order.
"""

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from mixer.batches import BatchSizes, global_batches
from mixer.reader import ShardLog
from tests.mixer.log import SIZES, stage, write_log

INFO = stage(64)
SIZES_OF_STEPS = BatchSizes(64, 8 * 64, {40 * 64: 11 * 64, 100 * 64: 5 * 64})  # 8 sequences, then 11, then 5
STEPS = list(SIZES_OF_STEPS.steps(sum(SIZES)))


def digests(part) -> list[str]:
    """One for each sequence that has a document; masked ones have none."""
    found = []
    for row in range(len(part.tokens)):
        segments = part.segments[part.segments["sequence"] == row]
        content = b"".join(segments[name].tobytes() for name in segments.dtype.names if name != "sequence")
        if len(segments):
            found.append(xxhash.xxh3_64_hexdigest(part.tokens[row].tobytes() + content))
    return found


def read(directory: str, out: str, state: dict, rank: int, ranks: int, pause: float) -> None:
    """What one rank's process does: a line per step, written whole or not at all."""
    batches = global_batches(ShardLog(directory), SIZES_OF_STEPS, state, rank, ranks, rows=2)
    with open(out, "a") as file:
        for after, parts in batches:
            file.write(json.dumps({"after": after, "parts": [digests(part) for part in parts]}) + "\n")
            file.flush()
            time.sleep(pause)


def run(directory: Path, out: Path, state: dict, ranks: int, stop_after: int) -> list[list[dict]]:
    """Read on `ranks` processes; kill them all once each has done `stop_after` steps. What each has written."""
    files = [out / f"{state['step']}-{ranks}-{rank}.jsonl" for rank in range(ranks)]
    pause = 0.03 if stop_after < len(STEPS) else 0
    processes = []
    for rank, file in enumerate(files):
        arguments = (str(directory), str(file), state, rank, ranks, pause)
        processes.append(multiprocessing.get_context("fork").Process(target=read, args=arguments))
        processes[-1].start()
    lines = lambda file: file.read_bytes().count(b"\n") if file.exists() else 0  # noqa: E731
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(p.is_alive() for p in processes):
        if all(lines(file) >= stop_after for file in files):
            for process in processes:
                process.kill()
        time.sleep(0.005)
    for process in processes:
        process.join(10)
    codes = {p.exitcode for p in processes}
    assert codes <= {0, -signal.SIGKILL} and (-signal.SIGKILL in codes or stop_after >= len(STEPS))
    return [[json.loads(x) for x in f.read_text().split("\n") if x.endswith("}")] for f in files]


def in_order(by_rank: list[list[dict]]) -> list[tuple[int, list[str]]]:
    """(where it stops, digests in global order) of the steps that every rank has finished."""
    found = []
    for steps in zip(*by_rank, strict=False):
        assert all(s["after"] == steps[0]["after"] for s in steps)
        parts = [d for micro in zip(*(s["parts"] for s in steps), strict=True) for part in micro for d in part]
        found.append((steps[0]["after"]["cursor"], parts))
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(directory of the log, its global batches as one process reads them, straight from the log)."""
    directory = tmp_path_factory.mktemp("log")
    write_log(str(directory), INFO)
    log = ShardLog(str(directory))
    log.wait(1)
    return directory, [(b, digests(log.read(a, b))) for a, b in STEPS]


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_steps_and_resumed_on_1_2_3_and_8_ranks(undisturbed, tmp_path, seed):
    directory, whole = undisturbed
    rng = random.Random(seed)
    worlds = rng.sample([1, 2, 3, 8], 4)
    state, found = {"plan": "plan", "stage": "main", "step": 0, "cursor": 0}, []
    for ranks in worlds[:-1]:
        kill_after = rng.randint(1, max(1, (len(STEPS) - state["step"]) // 2))
        by_rank = run(directory, tmp_path, state, ranks, kill_after)
        done = in_order(by_rank)
        # A checkpoint is older than the kill: some steps are read again.
        kept = max(1, len(done) - rng.randint(0, 2))
        found += done[:kept]
        state = by_rank[0][kept - 1]["after"]
    found += in_order(run(directory, tmp_path, state, worlds[-1], 1 << 30))
    assert found == whole
    assert sorted(d for _, batch in found for d in batch) == sorted(d for _, batch in whole for d in batch)


def test_the_digests_tell_sequences_apart(undisturbed):
    """Else the test above would pass whatever was read."""
    _, whole = undisturbed
    every = [d for _, batch in whole for d in batch]
    assert len(set(every)) == len(every) > 100
    assert np.unique([len(batch) for _, batch in whole]).size > 2
