"""The commit protocol on an object store: a local S3 server, with its races tried."""

import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid

import fsspec
import pyarrow as pa
import pytest

from dataprep import storage
from dataprep.storage import Attempt, Commit
from jobs.engine import Engine
from mixer.cache import ShardCache
from mixer.reader import ShardLog
from tests.jobs import toy
from tests.mixer import log


@pytest.fixture(scope="module")
def s3():
    """An S3 server of our own on localhost, and s3fs pointed at it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "FSSPEC_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }.items():
        patch.setenv(name, value)
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://127.0.0.1:{port}"}
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            break
        except OSError:
            time.sleep(0.1)
    try:
        yield fsspec.filesystem("s3")
    finally:
        server.kill()
        server.wait()
        patch.undo()
        fsspec.config.conf.pop("s3", None)


@pytest.fixture
def bucket(s3):
    name = f"b{uuid.uuid4().hex}"
    s3.mkdir(name)
    return f"s3://{name}"


def contents(s3, bucket: str) -> dict[str, bytes]:
    s3.invalidate_cache()
    return {f.split("/", 1)[1]: s3.cat_file(f) for f in s3.find(bucket)}


def test_same_bytes_as_on_a_local_disk_and_resume(s3, bucket, tmp_path):
    with Engine(str(tmp_path), workers=0) as engine:
        toy.toy(engine)
    with Engine(bucket, workers=0) as engine:
        toy.toy(engine)
    files = {
        str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file() and f.name != ".lock"
    }
    assert contents(s3, bucket) == files
    victim = next(f for f in files if "numbers" in f)
    s3.rm_file(f"{bucket}/{victim}")
    with Engine(bucket, workers=0) as engine:
        toy.toy(engine)
    assert contents(s3, bucket) == files


def test_two_attempts_at_once_leave_one_whole_result(s3, bucket):
    def attempt() -> None:
        out = Attempt(f"{bucket}/step", "k", {"in": "1"})
        barrier.wait()
        out.table("t", pa.table({"x": list(range(1000))}))
        barrier.wait()
        commits.append(out.commit({"n": 1000}))

    barrier, commits = threading.Barrier(4), []
    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(commits) == 4 and len({c.fingerprint for c in commits}) == 1
    assert len(contents(s3, bucket)) == 2  # one data file, one commit
    assert storage.read_table(Commit.load(f"{bucket}/step", "k").path("t")).num_rows == 1000


def test_a_late_attempt_with_other_input_is_whole_and_found_stale(s3, bucket):
    for value in (1, 2):  # the second is a straggler of an older run that commits last
        out = Attempt(f"{bucket}/step", "k", {"in": str(value)})
        out.table("t", pa.table({"x": [value]}))
        commit = out.commit({})
        assert storage.read_table(commit.path("t"))["x"].to_pylist() == [value]
    loaded = Commit.load(f"{bucket}/step", "k")
    assert loaded.inputs == {"in": "2"} and storage.read_table(loaded.path("t"))["x"].to_pylist() == [2]


def test_an_upload_that_fails_is_not_seen(s3, bucket, monkeypatch):
    out = Attempt(f"{bucket}/step", "k", {})
    with pytest.raises(RuntimeError), out.file("t", ".bin") as path:
        shutil.copy(__file__, path)
        raise RuntimeError("killed before the upload")
    assert contents(s3, bucket) == {} and Commit.load(f"{bucket}/step", "k") is None


def test_a_shard_log_is_followed_and_cached(s3, bucket, tmp_path):
    """Also where the client has listed the directory before the shards came."""
    info, directory = log.stage(64), f"{bucket}/pack"
    info.save(directory)
    storage.sizes(directory)
    reader = ShardLog(directory, cache=ShardCache(str(tmp_path), 1 << 20))
    for shard, size in enumerate(log.SIZES[:3]):
        assert reader.wait(0) == sum(log.SIZES[:shard])
        log.write(directory, shard, info, size)
    tokens, _ = log.expected(info, log.SIZES[:3])
    assert reader.wait(len(tokens)) == len(tokens)
    assert (reader.read(60, 80).tokens == tokens[60:80]).all()
    plain = ShardLog(directory)
    plain.wait(0)
    assert (plain.read(60, 80).tokens == tokens[60:80]).all()
    assert len(list(tmp_path.glob("*.arrow"))) == 2


def test_expand_reads_urls(s3, bucket):
    for name in ("a/1.txt", "a/b/2.txt", "c.txt"):
        storage.write_bytes(f"{bucket}/{name}", b"x")
    s3.invalidate_cache()
    assert storage.expand(f"{bucket}/a") == [f"{bucket}/a/1.txt", f"{bucket}/a/b/2.txt"]
    assert storage.expand(f"{bucket}/*.txt") == [f"{bucket}/c.txt"]
    assert storage.read_bytes(f"{bucket}/c.txt") == b"x" and storage.exists(f"{bucket}/c.txt")
