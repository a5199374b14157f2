"""The shard log: what is written is read, also while it is written; damage, failure and silence are told."""

import pickle
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from dataprep.storage import Attempt, Commit, UserError
from mixer.reader import Damaged, ShardLog
from mixer.shards import SEGMENT, beat, write_end, write_shard
from tests.mixer.log import SIZES, expected, rows, sequences, stage, write


@pytest.fixture
def log(tmp_path):
    info = stage()
    info.save(str(tmp_path))
    for shard, size in enumerate(SIZES):
        write(str(tmp_path), shard, info, size)
    return tmp_path


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize(("context", "dtype"), [(4096, "uint16"), (200_000, "uint32"), (48, "uint16")])
def test_round_trip_of_any_range(tmp_path, context, dtype, compression):
    info = stage(context, dtype, compression)
    info.save(str(tmp_path))
    sizes = SIZES if context < 10_000 else [3, 0, 2, 1]
    for shard, size in enumerate(sizes):
        write(str(tmp_path), shard, info, size)
    reader = ShardLog(str(tmp_path))
    assert reader.stage == info
    assert reader.wait(1) == sum(sizes)
    tokens, segments = expected(info, sizes)
    n = len(tokens)
    for start, stop in [(0, n), (0, 0), (n, n), (n - 1, n), (1, 3), (2, n - 1), (0, 1)]:
        batch = reader.read(start, stop)
        assert batch.tokens.dtype == dtype and np.array_equal(batch.tokens, tokens[start:stop])
        assert np.array_equal(batch.segments, rows(segments, start, stop))


def test_on_any_file_system():
    directory = "memory://log/stage"
    info = stage()
    info.save(directory)
    for shard, size in enumerate(SIZES):
        write(directory, shard, info, size)
    write_end(directory, SIZES, {})
    batch = ShardLog(directory).read(60, 80)
    assert np.array_equal(batch.tokens, expected(info)[0][60:80])


def test_plain_arrow_reads_it_and_the_metadata_are_as_documented(log):
    path = Commit.load(str(log), "00000").path("shard")
    with pa.memory_map(path) as file:
        reader = pa.ipc.open_file(file)
        assert reader.schema.metadata == {b"stage": b"main", b"plan": b"plan", b"tokenizer": b"tok", b"eos": b"3"}
        batches = [reader.get_batch_with_custom_metadata(i) for i in range(reader.num_record_batches)]
    assert [len(b) for b, _ in batches] == [32, 32, 6]  # 128K tokens
    tokens, segments = sequences(70, stage(), 0)
    for i, (batch, metadata) in enumerate(batches):
        part = tokens[32 * i : 32 * i + 32]
        assert np.array_equal(batch["tokens"].flatten().to_numpy().reshape(-1, 4096), part)
        assert metadata[b"xxh3"] == xxhash.xxh3_64_hexdigest(part.tobytes()).encode()
    docs = [[s["doc"] for s in row] for b, _ in batches for row in b["segments"].to_pylist()]
    assert docs == [segments["doc"][segments["sequence"] == row].tolist() for row in range(70)]


def test_shards_are_the_same_bytes_every_time(log, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write(str(other), 0, stage(), SIZES[0])
    assert Commit.load(str(other), "00000") == Commit.load(str(log), "00000")


def test_following_a_log_while_it_is_written_out_of_order(tmp_path):
    info, directory = stage(), str(tmp_path)
    info.save(directory)

    def packer():
        for shard in (1, 3, 0, 2):
            beat(directory)
            time.sleep(0.05)
            write(directory, shard, info, SIZES[shard])
        write_end(directory, SIZES, {"padding": 0})

    thread = threading.Thread(target=packer, daemon=True)
    thread.start()
    reader = ShardLog(directory)
    tokens, segments = expected(info)
    position = 0
    while (there := reader.wait(position + 1, timeout=20)) > position:
        batch = reader.read(position, there)
        assert np.array_equal(batch.tokens, tokens[position:there])
        assert np.array_equal(batch.segments, rows(segments, position, there))
        position = there
    thread.join()
    assert position == sum(SIZES) and reader.ended
    assert ShardLog(directory).wait(10**9) == position


def test_many_commits_are_asked_for_at_once(tmp_path, monkeypatch):
    """A log of thousands of shards that has not ended, on an object store, must not cost a round trip for each."""
    info = stage(48)
    info.save(str(tmp_path))
    write(str(tmp_path), 0, info, 3)
    commit = tmp_path / "00000.commit.json"
    for shard in range(1, 200):
        (tmp_path / f"{shard:05d}.commit.json").write_bytes(commit.read_bytes())
    lock, at_once, most = threading.Lock(), [0], [0]
    load = Commit.load

    def slow(directory, key):
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        with lock:
            at_once[0] -= 1
        return load(directory, key)

    monkeypatch.setattr("mixer.reader.Commit.load", slow)
    assert ShardLog(str(tmp_path)).wait(600) == 600
    assert most[0] > 16


def test_a_gap_is_not_read_over(tmp_path):
    stage().save(str(tmp_path))
    write(str(tmp_path), 0, stage(), 70)
    write(str(tmp_path), 3, stage(), 64)
    reader = ShardLog(str(tmp_path))
    assert reader.wait(70) == 70
    with pytest.raises(UserError, match=r"sequences 0\.\.70 .* not 69\.\.71"):
        reader.read(69, 71)


def test_a_dead_or_failed_packer_is_an_error_a_slow_one_is_not(tmp_path):
    info, directory = stage(), str(tmp_path)
    info.save(directory)
    reader = ShardLog(directory)
    with pytest.raises(UserError, match=r"heartbeat .* has stood still for 0.1 s"):
        reader.wait(1, timeout=0.1)

    stop = threading.Event()

    def slow():
        while not stop.wait(0.02):
            beat(directory)

    thread = threading.Thread(target=slow)
    thread.start()
    timer = threading.Timer(0.8, write, (directory, 0, info, 70))
    timer.start()
    try:
        assert reader.wait(1, timeout=0.4) == 70  # silent for longer than the timeout, but alive
    finally:
        stop.set()
        thread.join()
        timer.join()
    beat(directory, "no space left")
    assert reader.wait(70) == 70  # what is there can still be had
    with pytest.raises(UserError, match="packing of stage main failed: no space left"):
        reader.wait(71)


@pytest.mark.parametrize("where", ["tokens", "segments", "rows"])
def test_damage_is_found_and_named(log, where):
    """Rewrite batch 1 with one value changed and the old checksums, as a flaw below Arrow's own checks would."""
    path = Path(Commit.load(str(log), "00000").path("shard"))
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        batches = [reader.get_batch_with_custom_metadata(i) for i in range(3)]
    batch, metadata = batches[1]
    rows_ = batch.to_pylist()
    if where == "tokens":
        rows_[5]["tokens"][17] ^= 1
    elif where == "rows":
        row = next(i for i, row in enumerate(rows_) if i and row["segments"])
        rows_[row - 1]["segments"].append(rows_[row]["segments"].pop(0))
    else:
        next(row for row in rows_ if row["segments"])["segments"][0]["doc"] ^= 1
    batches[1] = pa.RecordBatch.from_pylist(rows_, schema=batch.schema), metadata
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        for b, m in batches:
            writer.write_batch(b, custom_metadata=m)
    reader = ShardLog(str(log))
    reader.wait(1)
    assert len(reader.read(0, 32).tokens) == 32
    with pytest.raises(UserError, match=rf"{path.name}, batch 1: damaged"):
        reader.read(30, 40)


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bytes_never_pass(log, seed):
    """Anywhere in the file: an error that names the file, or the right data (bytes that carry nothing)."""
    tokens, segments = expected(stage())
    path = Path(Commit.load(str(log), "00000").path("shard"))
    data = bytearray(path.read_bytes())
    data[np.random.default_rng(seed).integers(len(data))] ^= 0x55
    path.write_bytes(data)
    reader = ShardLog(str(log))
    reader.wait(1)
    try:
        batch = reader.read(0, 70)
    except UserError as error:
        assert path.name in str(error)
    else:
        assert np.array_equal(batch.tokens, tokens[:70]) and np.array_equal(batch.segments, rows(segments, 0, 70))


def test_missing_and_cut_files_are_named(log):
    path = Path(Commit.load(str(log), "00000").path("shard"))
    path.write_bytes(path.read_bytes()[:1000])
    reader = ShardLog(str(log))
    reader.wait(1)
    with pytest.raises(UserError, match=rf"{path.name} is damaged"):
        reader.read(0, 1)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{path.name} is damaged"):
        reader.read(0, 1)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name} is missing"):
        reader.read(0, 1)


def test_damage_found_on_one_rank_can_be_told_to_the_others():
    error = pickle.loads(pickle.dumps(Damaged("x.arrow, batch 3: damaged", "checksum differs")))
    assert str(error) == "x.arrow, batch 3: damaged" and error.why == "checksum differs"


def test_no_stage_and_another_formats_stage_are_told(tmp_path):
    with pytest.raises(UserError, match="no stage at"):
        ShardLog(str(tmp_path))
    (tmp_path / "stage.json").write_text('{"stage": "main"}')
    with pytest.raises(UserError, match="not of this version's format"):
        ShardLog(str(tmp_path))


def test_rows_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match="need"):
        write_shard(Attempt(str(tmp_path), "00000", {}), np.zeros((2, 7), np.uint16), np.zeros(0, SEGMENT), stage())
