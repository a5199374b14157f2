"""Readers: what is written in any format comes back, and a bad record costs only itself."""

import gzip
import hashlib
import json
import tracemalloc
import uuid

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dataprep import readers
from dataprep.config import SourceConfig
from dataprep.readers import Bad, Record, kind_of, read_records
from dataprep.streams import lines

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(lambda t: not t.isspace())
rows = st.lists(
    st.fixed_dictionaries(
        {"id": text, "text": text, "n": st.integers(-(2**53), 2**53), "deep": st.dictionaries(text, text)}
    )
)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def source(**values):
    return SourceConfig.model_validate({"name": "s", "paths": ["unused"], **values})


def jsonl(values) -> bytes:
    return b"".join(json.dumps(v).encode() + b"\n" for v in values)


def write(path, values):
    """Rows in the format of the file's suffix; archives of two members or frames."""
    name, half = str(path), len(values) // 2
    if name.endswith((".parquet", ".arrow", ".feather")):
        values = [{**v, "deep": json.dumps(v["deep"])} if "deep" in v else v for v in values]
        table = pa.Table.from_pylist(values) if values else pa.table({"text": pa.array([], pa.string())})
        if name.endswith(".parquet"):
            pq.write_table(table, path, row_group_size=3)
        else:
            new = pa.ipc.new_stream if name.endswith(".arrow") else pa.ipc.new_file
            with new(name, table.schema) as writer:
                writer.write_table(table, max_chunksize=2)
        return
    compress = {".gz": gzip.compress, "zst": zstandard.ZstdCompressor(write_checksum=True).compress}.get(
        name[-3:], bytes
    )
    path.write_bytes(compress(jsonl(values[:half])) + compress(jsonl(values[half:])))


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "arrow", "feather"])
@quick
@given(values=rows)
def test_round_trip(tmp_path, suffix, values):
    path = tmp_path / f"a.{suffix}"
    write(path, values)
    found = list(read_records(str(path), source()))
    assert [(r.record, r.text.decode(), r.id) for r in found] == [(i, v["text"], v["id"]) for i, v in enumerate(values)]
    for record, value in zip(found, values, strict=True):
        meta = json.loads(record.meta)
        deep = json.loads(meta["deep"]) if isinstance(meta["deep"], str) else meta["deep"]
        assert {"n": meta["n"], "deep": deep} == {"n": value["n"], "deep": value["deep"]}


@quick
@given(st.lists(st.binary(max_size=12)), st.integers(0, 8))
@example([b"123456789", b"\n", b"12\n345678901234567890\n\n1"], 8)
def test_lines_agree_with_split(content, limit):
    expected = b"".join(content).split(b"\n")
    if not expected[-1]:
        expected.pop()
    found = list(lines(content, limit))
    assert [size for _, size in found] == [len(line) for line in expected]
    for (line, size), whole in zip(found, expected, strict=True):
        assert line == whole if size <= limit else whole.startswith(line)


GOOD = b'{"text": "good"}'
BAD_LINES = {
    b'{"text": "half': "malformed JSON",
    b"{}{}": "malformed JSON",
    b"[" * 100_000: "malformed JSON",
    b'{"text": "caf\xe9"}': "invalid UTF-8",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8",
    b'{"body": "no text"}': "missing field",
    b'{"\\ud800": "no text"}': "missing field",
    b'{"text": null}': "missing field",
    b'{"text": 5}': "wrong type",
    b'["text"]': "wrong type",
    b'{"text": " \\n\\u00a0"}': "empty text",
    b'{"text": "' + b"x" * 200_000 + b'"}': "record too long",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_bad_line_between_good_ones(tmp_path, bad, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(suffix, bytes)
    path.write_bytes(compress(b"\xef\xbb\xbf" + GOOD + b"\r\n \n" + bad + b"\n" + GOOD))
    first, wrong, last = read_records(str(path), source(max_record_mb=0.15))
    assert isinstance(first, Record) and (first.record, first.text, first.id) == (0, b"good", None)
    assert isinstance(last, Record) and (last.record, last.text) == (3, b"good")
    assert isinstance(wrong, Bad) and (wrong.record, wrong.reason) == (2, BAD_LINES[bad])
    assert wrong.detail and 0 < len(wrong.excerpt) <= 200
    (wrong.detail + wrong.excerpt).encode()  # goes into a table


def nested(levels: int, text: str = "") -> bytes:
    """A record with so many levels of nesting."""
    return (
        json.dumps({"text": "good" + text, "m": None}).replace("null", "[" * (levels - 1) + "]" * (levels - 1)).encode()
    )


def test_nesting_has_a_limit_that_no_stack_moves(tmp_path):
    path = tmp_path / "a.jsonl"
    brackets = r"[{\" * 500 + r" ""
    flat = json.dumps({"text": brackets, "m": [[]] * 1000}).encode()
    cases = [nested(200), nested(201), nested(200, '"' + brackets), nested(201, '"' + brackets), flat, nested(900)]
    path.write_bytes(b"\n".join(cases))

    def read(stack):
        return read(stack - 1) if stack else list(read_records(str(path), source()))

    found = read(0)
    assert [type(r) for r in found] == [Record, Bad, Record, Bad, Record, Bad]
    assert {(r.reason, r.detail) for r in found[1::2]} == {("malformed JSON", "nested more than 200 levels deep")}
    assert found[2].text.decode() == 'good"' + brackets and found[4].text.decode() == brackets
    assert read(400) == found


@quick
@given(st.recursive(text, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3)))
@example([['\\"[', "]\\", {'"': "[["}]])
def test_depth(value):
    def depth(value):
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert readers._depth(json.dumps(value).encode()) == depth(value)


def test_lone_surrogates_and_numbers_that_are_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud800b\ud83d\ude00", "id": "\udfff", "m": ["\ud801", NaN, -Infinity, 1e999]}' + "\n")
    (record,) = read_records(str(path), source())
    assert record.text.decode() == "a\ufffdb\U0001f600" and record.id == "\ufffd"
    assert json.loads(record.meta) == {"m": ["\ufffd", None, None, None]}


def test_fields_by_name(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"body": "t", "key": 7, "x": [1], "id": "other"}, {"body": "t"}, {"body": "t", "key": True}]
    path.write_bytes(jsonl([*rows, {"body": "t", "id": None}]))
    mapped = {"text": "body", "id": "key"}
    first, *bad = read_records(str(path), source(fields=mapped))
    assert first == Record(0, b"t", "7", '{"x":[1],"id":"other"}')
    assert [(b.record, b.reason) for b in bad] == [(1, "missing field"), (2, "wrong type"), (3, "missing field")]
    first, *_ = read_records(str(path), source(fields=mapped, meta=["id", "absent"]))
    assert json.loads(first.meta) == {"id": "other"}
    *_, last = read_records(str(path), source(fields={"text": "body"}))
    assert last == Record(3, b"t", None, '{"id":null}')


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
def test_damaged_archive_keeps_what_came_before(tmp_path, suffix, damage):
    path = tmp_path / f"a.jsonl{suffix}"
    values = [{"text": hashlib.sha512(bytes([i % 256, i // 256])).hexdigest()} for i in range(8000)]
    write(path, values)
    data = bytearray(path.read_bytes())
    at = len(data) * 2 // 3
    path.write_bytes(data[:at] if damage == "truncated" else data[:at] + b"\xff" * 1000 + data[at + 1000 :])
    *before, last = read_records(str(path), source())
    assert [r.text.decode() for r in before[:4500]] == [v["text"] for v in values[:4500]]
    assert isinstance(last, Bad) and last.record == len(before)
    # Damage is only certain at the checksum; what lies between was decoded from damaged bytes.
    assert last.reason == {"truncated": "truncated archive", "corrupt": "unreadable file"}[damage]
    assert damage == "corrupt" or [r.text.decode() for r in before] == [v["text"] for v in values[: len(before)]]


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "feather"])
def test_damaged_columnar_file(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path, [{"text": f"text {i} " * 500} for i in range(100)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    *good, last = read_records(str(path), source())
    assert isinstance(last, Bad) and last.record == len(good)
    assert [r.text.decode() for r in good] == [f"text {i} " * 500 for i in range(len(good))]
    assert suffix == "parquet" or len(good) > 50  # Parquet's directory is at its end


def ipc(table, **values) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, **values) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a b c d", "e f g h", "changed", "changed"]),
        pa.array([["a"], ["b"], ["changed"], ["changed"]]),
        pa.array([1, 2, 3, 4], pa.int64()),
    ],
    ids=["string", "list", "beside bad text"],
)
def test_offsets_out_of_bounds_do_not_end_the_process(tmp_path, column):
    """The second batch's offsets point far outside its buffers: to use its values would be a segmentation fault."""
    path = tmp_path / "a.arrow"
    texts = pa.array([b"good 1", b"caf\xe9", b"good 3", b"good 4"], pa.binary()).view(pa.string())
    data = bytearray(ipc(pa.table({"text": texts, "m": column})))
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 6, 12))  # of "good 3" and "good 4"
    assert data.count(offsets) == 1
    at = data.index(offsets) + 4
    if not pa.types.is_integer(column.type):  # the other column's
        size = {"string": 7}.get(str(column.type), 1)
        at = data.index(b"".join((n * size).to_bytes(4, "little") for n in range(3)), at) + 4
    data[at : at + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    first, second, *rest = read_records(str(path), source())
    assert first.text == b"good 1" and (second.record, second.reason) == (1, "invalid UTF-8")
    assert [(r.record, r.reason) for r in rest] == [(2, "unreadable value"), (3, "unreadable value")]
    assert all(r.detail for r in rest)


@pytest.mark.parametrize("error", [MemoryError(), SystemError("negative size"), pa.ArrowIndexError("index")])
def test_what_arrow_raises_on_damaged_bytes(tmp_path, monkeypatch, error):
    path = tmp_path / "a.arrow"
    path.write_bytes(ipc(pa.table({"text": ["one", "two", "three"]})))
    to_rows = readers._to_rows

    def fail(batch):
        if len(batch) == 1:
            raise error
        return to_rows(batch)

    monkeypatch.setattr(readers, "_to_rows", fail)
    *good, last = read_records(str(path), source())
    assert [r.text for r in good] == [b"one", b"two"] and (last.record, last.reason) == (2, "unreadable file")
    assert last.detail


@quick
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=5))
def test_few_changed_bytes_of_an_arrow_file(tmp_path, changes):
    path = tmp_path / "a.arrow"
    texts = [f"text {i}" for i in range(8)]
    data = bytearray(ipc(pa.table({"text": texts, "m": pa.array([[t] for t in texts]), "d": texts})))
    for where, byte in changes:
        data[int(where * len(data))] = byte
    path.write_bytes(data)
    found = list(read_records(str(path), source()))
    assert [r.record for r in found] == list(range(len(found)))


FAR = {
    "timestamp": (pa.array([2**62, 0], pa.timestamp("us")), str(2**62), "1970-01-01 00:00:00"),
    "zone": (pa.array([2**62, 0], pa.timestamp("us", tz="UTC")), "17036-07-06", "1970-01-01 00:00:00+00:00"),
    "unknown zone": (pa.array([0, 0], pa.timestamp("us", tz="No/Where")), "1970-", "1970-01-01 00:00:00.000000Z"),
    "date32": (pa.array([2**31 - 1, 0], pa.date32()), str(2**31 - 1), "1970-01-01"),
    "duration": (pa.array([2**62, 0], pa.duration("s")), str(2**62), "0:00:00"),
}


@pytest.mark.parametrize("kind", FAR)
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_values_that_python_cannot_hold_become_strings(tmp_path, kind, suffix):
    column, far, near = FAR[kind]
    table = pa.table({"text": ["one", "two"], "when": column})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        path.write_bytes(ipc(table))
    first, second = read_records(str(path), source())
    assert (first.text, second.text) == (b"one", b"two")
    assert far in json.loads(first.meta)["when"]
    assert json.loads(second.meta) == {"when": near}


@pytest.mark.parametrize(
    "whens",
    [pa.array([[0], [2**62], [0]], pa.list_(pa.timestamp("us"))), pa.array([0, 2**60, 0], pa.date64())],
    ids=["no string either", "no date64 in itself"],
)
def test_a_value_that_nothing_holds_costs_its_own_record(tmp_path, whens):
    path = tmp_path / "a.arrow"
    path.write_bytes(ipc(pa.table({"text": ["one", "two", "three"], "whens": whens})))
    first, second, third = read_records(str(path), source())
    assert (first.text, third.text, third.record) == (b"one", b"three", 2)
    assert (second.record, second.reason) == (1, "unreadable value") and second.detail


def test_bad_rows_of_a_columnar_file(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pa.array([b"good", b"caf\xe9", None, b" ", b"x" * 2000, b"good"], pa.binary())
    for column in (texts, texts.view(pa.string())):
        pq.write_table(pa.table({"text": column, "when": pa.array([0] * 6, pa.timestamp("s"))}), path)
        found = list(read_records(str(path), source(max_record_mb=0.001)))
        assert [r.record for r in found] == list(range(6))
        assert [r.reason for r in found[1:5]] == ["invalid UTF-8", "missing field", "empty text", "record too long"]
        assert found[0].text == found[5].text == b"good" and json.loads(found[0].meta) == {
            "when": "1970-01-01 00:00:00"
        }
    (whole,) = read_records(str(path), source(fields={"text": "body"}))
    assert (whole.record, whole.reason) == (0, "missing field") and "'body'" in whole.detail
    (kept, *_) = read_records(str(path), source(meta=[]))
    assert kept.meta == "{}"


def test_text_files(tmp_path):
    path = tmp_path / "a.md"
    cases = [(b"\xef\xbb\xbf# T\r\n", Record(0, b"# T\r\n", str(path), "{}")), (b"", "empty text")]
    cases += [(b"caf\xe9", "invalid UTF-8"), (b"x" * 2000, "record too long"), (b"a\0b", "binary file")]
    for content, expected in cases:
        path.write_bytes(content)
        (found,) = read_records(str(path), source(kind="tree", max_record_mb=0.001))
        assert (found if isinstance(expected, Record) else found.reason) == expected


def test_long_line_is_never_held_in_memory(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    with zstandard.open(path, "wb") as file:
        file.write(GOOD + b"\n")
        for i in range(300):
            file.write(uuid.UUID(int=i).bytes.hex().encode() * 32_000)
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    found = list(read_records(str(path), source(max_record_mb=1)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(r) for r in found] == [Record, Bad, Record] and found[2].record == 2
    assert peak < 100e6 < 300 * 32 * 32_000


def test_through_fsspec():
    for suffix, data in {"jsonl": GOOD, "jsonl.gz": gzip.compress(GOOD), "jsonl.zst": zstandard.compress(GOOD)}.items():
        url = f"memory://{uuid.uuid4().hex}/a.{suffix}"
        with fsspec.open(url, "wb") as file:
            file.write(data)
        assert list(read_records(url, source())) == [Record(0, b"good", None, "{}")]
    url = f"memory://{uuid.uuid4().hex}/a.parquet"
    with fsspec.open(url, "wb") as file:
        pq.write_table(pa.table({"text": ["good"]}), file)
    assert list(read_records(url, source())) == [Record(0, b"good", None, "{}")]


def test_failing_disk_is_not_taken_for_a_damaged_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        list(read_records(str(tmp_path / "none.jsonl"), source()))
    with pytest.raises(IsADirectoryError):
        list(read_records(str(tmp_path), source(kind="parquet")))


def test_kind_by_suffix():
    assert [kind_of(p, source()) for p in ("a.b/c.JSONL.gz", "x.parquet", "x.txt.zst")] == ["jsonl", "parquet", "text"]
    for unknown in ("a.jsonl/data", "x.csv"):
        with pytest.raises(ValueError, match="none of the suffixes"):
            kind_of(unknown, source())


def test_a_damaged_row_group_costs_its_own_records_only(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"document {n} " + "x" * n for n in range(40)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    path.write_bytes(data)
    found = list(read_records(str(path), source()))
    good, bad = [f for f in found if isinstance(f, Record)], [f for f in found if isinstance(f, Bad)]
    assert [(g.record, g.text.decode()) for g in good] == [(n, texts[n]) for n in [*range(10), *range(20, 40)]]
    assert [(b.record, b.reason) for b in bad] == [(10, "unreadable file")]
    assert "row group 1, its last 10 of 10 records" in bad[0].detail
