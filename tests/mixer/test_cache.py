"""The cache of remote shards: each fetched once, bounded in bytes, shared by processes, damage on either side told."""

import multiprocessing
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dataprep.storage import Commit, UserError
from mixer.cache import ShardCache
from mixer.reader import Damaged, ShardLog
from tests.mixer.log import SIZES, expected, stage, write_log

INFO = stage(512)
TOTAL = sum(SIZES)


@pytest.fixture
def remote():
    directory = "memory://remote/stage"
    write_log(directory, INFO)
    yield directory
    fsspec.filesystem("memory").rm("/remote", recursive=True)


@pytest.fixture
def fetched(monkeypatch):
    """Every path that is downloaded."""
    names = []
    memory = type(fsspec.filesystem("memory"))
    original = memory.get_file
    monkeypatch.setattr(memory, "get_file", lambda fs, path, *rest: names.append(path) or original(fs, path, *rest))
    return names


def size(directory) -> int:
    return sum(f.stat().st_size for f in Path(directory).iterdir())


def test_every_shard_is_fetched_once(remote, fetched, tmp_path):
    cache = ShardCache(str(tmp_path), 1 << 30)
    for _ in range(2):
        log = ShardLog(remote, cache=cache)
        assert log.wait(1) == TOTAL
        assert np.array_equal(log.read(0, TOTAL).tokens, expected(INFO)[0])
    assert len(fetched) == len(set(fetched)) == 3  # one of the four is empty


def test_the_longest_unused_goes(remote, fetched, tmp_path):
    sizes = [Commit.load(remote, f"{k:05d}").bytes for k in (0, 2, 3)]
    most = sum(sizes) - min(sizes)
    (tmp_path / ".tmp-killed").write_bytes(b"x" * most)  # of a killed download
    for start in (0, 80, 0, 110, 0):
        log = ShardLog(remote, cache=ShardCache(str(tmp_path), most))
        log.wait(1)
        log.read(start, start + 1)
        assert size(tmp_path) <= most
    assert len(fetched) == 3  # the first one was used before every other


def test_a_cache_too_small_for_a_shard_is_told(remote, tmp_path):
    log = ShardLog(remote, cache=ShardCache(str(tmp_path), 1000))
    log.wait(1)
    with pytest.raises(UserError, match="may hold 1,000 bytes"):
        log.read(0, 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x55
    path.write_bytes(data)


def test_a_damaged_copy_is_fetched_again_a_damaged_original_is_named(remote, fetched, tmp_path):
    cache = ShardCache(str(tmp_path), 1 << 30)
    log = ShardLog(remote, cache=cache)
    log.wait(1)
    log.read(0, 1)
    flip(next(tmp_path.glob("*.arrow")))
    log = ShardLog(remote, cache=cache)
    log.wait(1)
    assert np.array_equal(log.read(0, 70).tokens, expected(INFO)[0][:70])
    assert len(fetched) == 2

    fs = fsspec.filesystem("memory")
    path = Commit.load(remote, "00002").path("shard")
    data = bytearray(fs.cat_file(path))
    data[len(data) // 3] ^= 0x55
    fs.pipe_file(path, bytes(data))
    with pytest.raises(Damaged, match=r"00002\.shard\..*, batch 0: damaged"):
        log.read(70, 71)


def _read(directory: str, cache: str, most: int, seed: int) -> bool:
    log = ShardLog(directory, cache=ShardCache(cache, most))
    log.wait(1)
    tokens = expected(INFO)[0]
    starts = np.random.default_rng(seed).integers(0, TOTAL - 1, 20).tolist()
    return all(np.array_equal(log.read(a, a + 1).tokens, tokens[a : a + 1]) for a in starts)


def test_processes_share_it(remote, tmp_path):
    """With room for less than all shards, so that they also remove what others have mapped."""
    most = sum(Commit.load(remote, f"{k:05d}").bytes for k in (0, 3)) + 10
    with multiprocessing.get_context("fork").Pool(3) as pool:  # forked: they have the memory file system's files
        assert all(pool.starmap(_read, [(remote, str(tmp_path), most, seed) for seed in range(6)]))
    assert size(tmp_path) <= most
