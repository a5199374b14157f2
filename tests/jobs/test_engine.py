"""The step engine: resume, staleness, sweeping, same bytes for any number of workers and after any kill."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dataprep import storage
from dataprep.storage import Attempt, Commit, UserError
from jobs import exchange
from jobs.engine import DryRunEnd, Engine, Step, Task
from tests.jobs import toy
from tests.tree import commits, tree

CHECKOUT = Path(__file__).resolve().parents[2]


def serial(root: Path, **options: int) -> dict[str, str]:
    with Engine(str(root), workers=0) as engine:
        toy.toy(engine, **options)
    return tree(root)


def test_second_run_makes_nothing_and_first_run_is_complete(tmp_path):
    first = serial(tmp_path)
    stamps = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"}
    assert serial(tmp_path) == first
    assert stamps == {f: f.stat().st_mtime_ns for f in stamps}
    with Engine(str(tmp_path), workers=0) as engine:
        assert toy.toy(engine)[-1].aggregates == {"rows": toy.PARTITIONS * toy.ROWS}


def test_a_removed_or_damaged_file_is_made_again(tmp_path):
    first = serial(tmp_path)
    for pattern in ("make-*/*numbers*", "collect-*/00001.sorted*", "total-*/*.commit.json"):
        victim = next(tmp_path.glob(pattern))
        victim.write_bytes(b"") if "sorted" in pattern else victim.unlink()
        assert serial(tmp_path) == first
    shutil.rmtree(next(tmp_path.glob("collect-*")))
    assert serial(tmp_path) == first


def test_more_and_fewer_partitions_equal_a_fresh_run(tmp_path):
    small = serial(tmp_path / "small", partitions=3)
    full = serial(tmp_path / "full")
    assert serial(tmp_path / "small") == full
    assert serial(tmp_path / "full", partitions=3) == small


def test_only_the_added_partition_runs(tmp_path, monkeypatch):
    serial(tmp_path, partitions=3)
    ran = []
    monkeypatch.setattr(toy, "make", lambda out, *args, make=toy.make: (ran.append(out.key), make(out, *args))[1])
    serial(tmp_path, partitions=4)
    assert ran == ["00003"]


def test_unfinished_attempts_and_strangers(tmp_path):
    first = serial(tmp_path)
    folder = next(tmp_path.glob("make-*"))
    (folder / ".tmp-0123").write_bytes(b"half a file of a killed attempt")
    (folder / "00009.numbers.0123456789ab.parquet").write_bytes(b"a file without a commit")
    assert serial(tmp_path) == first
    (folder / "notes.txt").write_text("a user's own file stays")
    serial(tmp_path)
    assert (folder / "notes.txt").exists()


def test_frozen_step_keeps_its_first_result(tmp_path):
    with Engine(str(tmp_path), workers=0) as engine:
        paths = [c.path("sorted") for c in toy.toy(engine) if "sorted" in c.files]
        one = engine.once(Step("f", 1), toy.total, Task("all", {"x": "1"}, (paths[:1],)), frozen=True)
        two = engine.once(Step("f", 1), toy.total, Task("all", {"x": "2"}, (paths,)), frozen=True)
        assert one == two
        assert engine.once(Step("f", 1), toy.total, Task("all", {"x": "2"}, (paths,))).aggregates != one.aggregates


def test_dry_run_changes_nothing(tmp_path):
    before = tree(tmp_path)
    with Engine(str(tmp_path), workers=0, dry_run=True) as engine, pytest.raises(DryRunEnd, match="make"):
        toy.toy(engine)
    assert tree(tmp_path) == before and not list(tmp_path.iterdir())
    serial(tmp_path)
    shutil.rmtree(next(tmp_path.glob("collect-*")))
    with Engine(str(tmp_path), workers=0, dry_run=True) as engine, pytest.raises(DryRunEnd, match="collect"):
        toy.toy(engine)


def test_a_failure_keeps_what_was_done_and_names_the_cause(tmp_path):
    def broken(out: Attempt, number: int) -> dict:
        if number == 2:
            raise UserError("partition 2 is cursed")
        out.table("t", pa.table({"n": [number]}))
        return {}

    tasks = [Task(str(n), {}, (n,)) for n in range(4)]
    with Engine(str(tmp_path), workers=0) as engine:
        with pytest.raises(UserError, match="cursed"):
            engine.map(Step("b", 1), broken, tasks)
        done = engine.committed(Step("b", 1).directory(engine.root), tasks)
        assert sorted(done) == ["0", "1"]


def test_one_run_at_a_time_under_a_root(tmp_path):
    with Engine(str(tmp_path), workers=0), pytest.raises(UserError, match="another run"):
        Engine(str(tmp_path), workers=0)
    Engine(str(tmp_path), workers=0).close()


@pytest.mark.parametrize("code", ["ENOSPC", "EACCES", "EROFS"])
def test_disk_full_and_forbidden_are_one_clear_line(tmp_path, monkeypatch, code):
    import errno

    def refuse(source, target):
        raise OSError(getattr(errno, code), "refused", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    with Engine(str(tmp_path), workers=0) as engine, pytest.raises(UserError, match=r"space|permission"):
        toy.toy(engine)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.commit.json")) and not list(tmp_path.rglob(".tmp-*"))


def test_commit_is_canonical_and_checks_size(tmp_path):
    out = Attempt(str(tmp_path), "k", {"b": "2", "a": "1"})
    out.table("t", pa.table({"x": [1, 2]}))
    commit = out.commit({"n": 1})
    assert Commit.load(str(tmp_path), "k") == commit
    again = Attempt(str(tmp_path), "k", {"a": "1", "b": "2"})
    again.table("t", pa.table({"x": [1, 2]}))
    before = tree(tmp_path)
    assert again.commit({"n": 1}).fingerprint == commit.fingerprint
    assert tree(tmp_path) == before


# -- the exchange ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@example(100_000, 10_000, 1 << 20)
@example(100_000, 10_000, 256 << 20)
@example(262, 4_872, 88_189_578)  # coarse ranges of just over one task's bytes
@given(st.integers(1, 200_000), st.integers(1, 20_000), st.integers(1, 1 << 30))
def test_mean_slice_is_large_however_many_partitions_and_ranges(partitions, ranges, partition_bytes):
    """By the counts that follow from the strides: 4 MB, or as much as a range or a file has at all."""
    total = partitions * partition_bytes
    levels = exchange.strides(partitions, ranges, total)
    assert levels[-1] == 1 and levels == sorted(levels, reverse=True)
    files, span = partitions, ranges  # files of a level, and the ranges in each
    for stride in levels:
        slices = files * -(-span // stride)
        possible = min(exchange.MIN_SLICE, total / ranges, total / files)
        assert total / slices >= 0.9 * possible or slices <= exchange.FEW_SLICES
        groups = -(-ranges // stride)
        each = max(1, files // -(-ranges // span))  # files that hold a coarse range
        files, span = groups * -(-each // exchange.together(each, total // max(1, groups * each))), stride


def test_recursive_exchange_equals_the_direct_one(tmp_path, monkeypatch):
    direct = serial(tmp_path / "direct")
    monkeypatch.setattr(exchange, "FEW_SLICES", 1)
    monkeypatch.setattr(exchange, "MIN_SLICE", 1 << 10)
    monkeypatch.setattr(exchange, "TASK_BYTES", 2 << 10)
    assert len(exchange.strides(toy.PARTITIONS, toy.RANGES, 6 * 3000)) > 1
    assert serial(tmp_path / "recursive") == direct


def test_no_row_is_lost_for_any_strides(tmp_path):
    rng = np.random.default_rng(0)
    for trial in range(5):
        ranges = int(rng.integers(1, 40))
        tables = [odd_table(rng.integers(0, 1 << 30, n)) for n in rng.integers(0, 50, 7)]
        paths = []
        for n, table in enumerate(tables):
            out = Attempt(str(tmp_path / str(trial)), str(n), {})
            exchange.write_slices(out, table, table["v"].to_numpy() % ranges, 1)
            paths.append(storage.join(out.directory, out.files["slices"]["name"]))
        everything = np.concatenate([t["v"].to_numpy() for t in tables])
        for r in range(ranges):
            got = exchange.read_slices(paths, r)
            values = got["v"].to_numpy()
            assert sorted(values) == sorted(everything[everything % ranges == r])
            assert got.drop_columns(["_range"]).equals(odd_table(values).unify_dictionaries())


def odd_table(values: np.ndarray) -> pa.Table:
    """Columns of every kind that an exchange may carry, made from one."""
    numbers = values.tolist()
    return pa.table(
        {
            "v": values,
            "even": pa.array([v % 2 == 0 if v % 3 else None for v in numbers], pa.bool_()),
            "text": pa.array([str(v) if v % 5 else None for v in numbers], pa.string()),
            "list": pa.array([list(range(v % 7)) for v in numbers], pa.large_list(pa.uint64())),
            "source": pa.DictionaryArray.from_arrays(pa.array(values % 2, pa.int32()), ["a", "b"]),
        }
    )


def test_a_damaged_slice_is_named(tmp_path):
    out = Attempt(str(tmp_path), "k", {})
    exchange.write_slices(out, pa.table({"v": range(1000)}), np.arange(1000) % 4, 1)
    path = tmp_path / out.files["slices"]["name"]
    whole = path.read_bytes()
    wrong = 0
    for place in [*range(16, len(whole), 97), *range(len(whole) - 1500, len(whole), 7)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            got = pa.concat_tables([exchange.read_slices([str(path)], r) for r in range(4)])
            assert sorted(got["v"].to_pylist()) == list(range(1000))  # padding, say
        except UserError as error:
            assert f"{path.name} is damaged" in str(error)
            wrong += 1
    assert wrong > 20


# -- Ray, kills -----------------------------------------------------------------------------------------------------


def run_toy(root: Path, workers: int, pause: float = 0.0, die: str = "") -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.jobs.toy", str(root), str(workers), str(pause), die]
    return subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.PIPE, start_new_session=True)


def test_same_bytes_on_ray_with_a_killed_worker_and_a_killed_driver(tmp_path):
    expected = serial(tmp_path / "serial")
    run = run_toy(tmp_path / "worker", 2, die=str(tmp_path / "died"))
    assert run.wait(120) == 0, run.stderr.read().decode()
    assert (tmp_path / "died").exists()
    assert tree(tmp_path / "worker") == expected
    kill_until_done(tmp_path / "driver", kills=2, seed=1)
    assert tree(tmp_path / "driver") == expected


@pytest.mark.soak
def test_soak_thirty_kills(tmp_path):
    expected = serial(tmp_path / "serial")
    for seed in range(15):
        root = tmp_path / str(seed)
        kill_until_done(root, kills=2, seed=seed)
        assert tree(root) == expected


def kill_until_done(root: Path, kills: int, seed: int) -> None:
    """SIGKILL the driver's whole session at moments of real work, then let the same command finish."""
    rng = random.Random(seed)
    for _ in range(kills):
        run = run_toy(root, 2, pause=0.3)
        goal = commits(root) + rng.randint(1, 5)
        while run.poll() is None and commits(root) < goal:
            time.sleep(0.01)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        run.stderr.close()
    run = run_toy(root, 2)
    assert run.wait(120) == 0, run.stderr.read().decode()


def test_four_workers_equal_serial(tmp_path):
    expected = serial(tmp_path / "serial")
    run = run_toy(tmp_path / "four", 4)
    assert run.wait(120) == 0, run.stderr.read().decode()
    assert tree(tmp_path / "four") == expected
