"""Global batches: sizes and slices by hand, what a thread reads ahead, resume that refuses, errors that arrive."""

import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataprep.storage import UserError, join, write_json
from mixer.batches import BatchSizes, global_batches, slices
from mixer.reader import ShardLog
from mixer.shards import beat, write_end
from tests.mixer.log import SIZES, expected, rows, stage, write, write_log

TOTAL = sum(SIZES)
INFO = stage(64)


@pytest.fixture
def log(tmp_path):
    write_log(str(tmp_path), INFO)
    return ShardLog(str(tmp_path))


@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 9), st.integers(1, 5), st.integers(1, 3))
def test_slices_are_contiguous_even_and_as_many_on_every_rank(start, n, ranks, runs, together):
    most = runs * together
    by_rank = [list(slices(start, start + n, r, ranks, most, together)) for r in range(ranks)]
    assert len({len(mine) for mine in by_rank}) == 1
    in_order = [edge for micro in zip(*by_rank, strict=True) for edge in micro]
    assert all(b - a <= most for a, b in in_order)
    assert [a for a, _ in in_order[:1]] == ([start] if n else [])
    assert all(one[1] == other[0] for one, other in pairwise(in_order))
    assert sum(b - a for a, b in in_order) == n
    assert all((a - start) % together == 0 or a == b == start + n for a, b in in_order)
    for micro in zip(*by_rank, strict=True):
        counts = [-(-(b - a) // together) for a, b in micro]
        assert max(counts) - min(counts) <= 1


def test_sizes_change_at_marks_and_are_rounded_up():
    sizes = BatchSizes(context=100, tokens=250, marks={1000: 450, 2000: 1}, before=300)
    # 3 sequences until 300 before + 7 x 100 have been seen, at the step's beginning; then 5; then 1
    assert list(sizes.steps(21)) == [(0, 3), (3, 6), (6, 9), (9, 14), (14, 19), (19, 20), (20, 21)]
    assert list(BatchSizes(100, 250).steps(7)) == [(0, 3), (3, 6), (6, 7)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_together_read_the_global_batches(log, ranks):
    """3 ranks and a batch of 8, 8 ranks and a last step of 7: who has no sequence gets a masked one."""
    tokens, segments = expected(INFO)
    sizes = BatchSizes(64, 8 * 64)
    found = [list(global_batches(ShardLog(log.directory), sizes, rank=r, ranks=ranks, rows=2)) for r in range(ranks)]
    assert {len(steps) for steps in found} == {-(-TOTAL // 8)}
    for at, steps in enumerate(zip(*found, strict=True)):
        start, stop = 8 * at, min(8 * at + 8, TOTAL)
        assert all(state == {"plan": "plan", "stage": "main", "step": at + 1, "cursor": stop} for state, _ in steps)
        assert len({len(parts) for _, parts in steps}) == 1
        cursor = start
        for micro in zip(*(parts for _, parts in steps), strict=True):
            for part in micro:
                if not len(part.segments) and (part.tokens == INFO.eos).all():
                    continue  # masked
                assert np.array_equal(part.tokens, tokens[cursor : cursor + len(part.tokens)])
                assert np.array_equal(part.segments, rows(segments, cursor, cursor + len(part.tokens)))
                cursor += len(part.tokens)
        assert cursor == stop


def cursors(batches) -> list[int]:
    return [state["cursor"] for state, _ in batches]


def test_resume_goes_on_from_a_state_and_refuses_another_log(log):
    sizes = BatchSizes(64, 60 * 64)
    state, _ = next(global_batches(log, sizes))
    assert state == {"plan": "plan", "stage": "main", "step": 1, "cursor": 60}
    assert cursors(global_batches(log, sizes, state)) == [120, TOTAL]
    for odd, message in (
        ({"plan": "other"}, r"the run reads plan other, .* holds plan plan"),
        ({"stage": "base"}, r"the run reads stage base, .* holds stage main"),
        ({"cursor": TOTAL + 1}, f"sequence {TOTAL + 1} of stage main: .* ends at {TOTAL}"),
    ):
        with pytest.raises(UserError, match=message):
            next(global_batches(log, sizes, state | odd))


def test_the_next_step_is_read_while_this_one_is_used(log):
    """And no further; what nobody asks for after all is forgotten; close ends the thread."""
    before, read, seen = threading.active_count(), threading.Event(), []
    original = log._load
    log._load = lambda shard, number: seen.append(shard) or (shard == 2 and read.set()) or original(shard, number)
    batches = global_batches(log, BatchSizes(64, 70 * 64))
    next(batches)
    assert read.wait(10) and set(seen) <= {0, 2, 3}  # shard 0 was asked for, the step after it holds 2 and 3
    assert len(log._ahead) == 1
    log.read_ahead([(0, 5), (3, 3), (TOTAL - 1, TOTAL + 1)])
    assert list(log._ahead) == [(0, 5)]  # neither what is empty nor what is not there yet
    log.close()
    assert threading.active_count() == before
    assert next(batches)[0]["cursor"] == 140  # read when it is asked for


def test_an_error_of_the_thread_reaches_the_caller_who_reads_that_step(log):
    original = log._load

    def load(shard, number):
        if shard == 2:
            raise RuntimeError("the disk is gone")
        return original(shard, number)

    log._load = load
    sizes = BatchSizes(64, 35 * 64)
    batches = global_batches(log, sizes)
    next(batches)
    last, _ = next(batches)
    assert last["cursor"] == 70
    for again in (batches, global_batches(log, sizes, last)):
        with pytest.raises(RuntimeError, match="the disk is gone"):
            next(again)
    log._load = original
    assert cursors(global_batches(log, sizes, last)) == [105, 140, TOTAL]


def test_following_a_packer_and_its_death(tmp_path):
    directory = str(tmp_path)
    INFO.save(directory)
    beat(directory, "no space left")
    write(directory, 0, INFO, SIZES[0])
    sizes = BatchSizes(64, 60 * 64)
    batches = global_batches(ShardLog(directory), sizes)
    state, _ = next(batches)
    assert state["cursor"] == 60  # what is there can still be had
    with pytest.raises(UserError, match="no space left"):
        next(batches)
    for shard in (1, 2, 3):
        write(directory, shard, INFO, SIZES[shard])
    write_end(directory, SIZES, {})
    assert cursors(global_batches(ShardLog(directory), sizes, state)) == [120, TOTAL]


def test_what_is_in_quarantine_stops_a_run_or_comes_masked(log):
    info = {"shard": 2, "batch": 0, "file": "x.arrow", "first": 70, "sequences": 33, "why": "checksum differs"}
    write_json(join(log.directory, "quarantine.json"), {"batches": [info]})
    sizes = BatchSizes(64, 35 * 64)
    batches = global_batches(ShardLog(log.directory), sizes)
    assert [next(batches)[0]["cursor"], next(batches)[0]["cursor"]] == [35, 70]
    with pytest.raises(UserError, match=r"x.arrow, batch 0: in quarantine .* sequences 70\.\.103"):
        next(batches)
    tokens, segments = expected(INFO)
    _, (part,) = list(global_batches(ShardLog(log.directory, "mask"), sizes))[2]
    assert (part.tokens[:33] == INFO.eos).all() and np.array_equal(part.tokens[33:], tokens[103:105])
    want = rows(segments, 103, 105)
    want["sequence"] += 33
    assert np.array_equal(part.segments, want)
