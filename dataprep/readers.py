"""Records out of JSONL, Parquet, Arrow and text files. A bad record comes as `Bad`; those around it survive."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dataprep import python_installation
from dataprep.config import Fields, Kind, SourceConfig
from dataprep.storage import UserError, open_file
from dataprep.streams import Unreadable, blocks, lines

SUFFIXES: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow",
    ".txt": "text", ".md": "text", ".markdown": "text", ".rst": "text",
}  # fmt: skip
BOM = b"\xef\xbb\xbf"
BATCH_BYTES = 16 << 20  # of a columnar file, decoded at a time
MAX_DEPTH = 200  # of nested JSON: a limit of our own, since Python's depends on how deep the caller's stack is
BINARY_PROBE = 8192  # a source tree's file with a NUL among so many first bytes is no text

_ARROW_MAGIC = b"ARROW1"
_SURROGATE = re.compile("[\ud800-\udfff]")
_STRING = re.compile(rb'"[^"]*"?')
_NOT_STRUCTURE = bytes(set(range(256)) - set(b'"[]{}'))
_UNFIT = (pa.ArrowException, ValueError, OverflowError, KeyError)  # of values that Python's own types cannot hold


class Record(NamedTuple):
    """A good record. record: its number in the file, from 0. text: valid UTF-8, not blank. id: None if it has none.

    meta: the other fields as one JSON object.
    """

    record: int
    text: bytes
    id: str | None
    meta: str


class Bad(NamedTuple):
    """A record that is not taken, and why: a short class, what exactly, and how it begins (200 characters at most)."""

    record: int
    reason: str
    detail: str
    excerpt: str


class Rejected(Exception):
    """Why a record is not taken: (reason, detail)."""


def kind_of(path: str, source: SourceConfig) -> Kind:
    """How to read a file. ValueError where neither the source nor the file's suffix says."""
    if source.kind:
        return source.kind
    name = path.removesuffix(".gz").removesuffix(".zst")
    suffix = "." + name.rsplit("/", 1)[-1].rpartition(".")[2].lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} has none of the suffixes {' '.join(SUFFIXES)}")
    return SUFFIXES[suffix]


def named_records(key: str, path: str, text: str = "text") -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, text, other fields) of every record in a file that a key of the configuration names.

    Of a text file, every line that is not blank is one. UserError, naming the key, for the first that is not taken.
    """
    source = SourceConfig(name="named", paths=(path,), fields=Fields(text=text, id=None))
    try:
        kind = kind_of(path, source)
    except ValueError as error:
        raise UserError(f"{key}: {error}; convert it or name another file") from None
    try:
        for found in read_records(path, source):
            if isinstance(found, Bad):
                where = f"{path}, record {found.record}"
                raise UserError(f"{key}: {where}: {found.reason} ({found.detail}); mend or remove it")
            if kind == "text":
                lines = enumerate(found.text.decode().splitlines())
                yield from ((number, line, {}) for number, line in lines if line.strip())
            else:
                yield found.record, found.text.decode(), json.loads(found.meta)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read ({error}); name a file") from None


def read_records(path: str, source: SourceConfig) -> Iterator[Record | Bad]:
    """All records of a file in order, as `Record` or `Bad`; blank lines of JSONL are numbered but skipped.

    A truncated or corrupt file gives what comes before the damage, then one `Bad` for the rest. OSError where
    the file cannot be opened or the connection to it fails.
    """
    kind = kind_of(path, source)
    read = {"jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow}.get(kind, _text)
    number = 0
    with open_file(path) as file:
        try:
            for found in read(file, path, source):
                number = found.record + 1
                yield found
        except Unreadable as error:
            yield Bad(number, error.reason, error.detail, "")


def _bad(number: int, why: Rejected, data: bytes) -> Bad:
    reason, detail = why.args
    return Bad(number, reason, _clean(detail[:200]), data[:800].decode("utf-8", "replace")[:200])


def _jsonl(file: BinaryIO, path: str, source: SourceConfig) -> Iterator[Record | Bad]:
    for number, (raw, size) in enumerate(lines(blocks(file, path), source.max_record)):
        line = raw if number else raw.removeprefix(BOM)
        if not line or line.isspace():
            continue
        try:
            if size > source.max_record:
                raise Rejected("record too long", f"{size:,} bytes; max_record_mb is {source.max_record_mb:g}")
            yield _record(number, _parse(line), source)
        except Rejected as why:
            yield _bad(number, why, line)


def _parse(line: bytes) -> dict[str, Any]:
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(line) > MAX_DEPTH:
        raise Rejected("malformed JSON", f"nested more than {MAX_DEPTH} levels deep")
    try:
        text = _utf8(line).strip(" \t\r")
        value, end = _decoder.raw_decode(text)  # `decode` takes half as long again on small records
        if end != len(text):
            raise ValueError(f"extra data after character {end}")
    except ValueError as error:
        raise Rejected("malformed JSON", str(error)) from error
    if not isinstance(value, dict):
        raise Rejected("wrong type", f"the line is a {type(value).__name__}, not an object")
    return value


def _depth(line: bytes) -> int:
    """How many brackets are open at once at most, as far as the line is JSON."""
    structure = line.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
    brackets = np.frombuffer(_STRING.sub(b"", structure), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    return int(np.where(opening, 1, -1).cumsum().max(initial=0))


def _utf8(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Rejected("invalid UTF-8", f"byte 0x{data[error.start]:02x} at {error.start}") from error


def _record(number: int, row: dict[str, Any], source: SourceConfig) -> Record:
    """A record from its fields; takes text and id out of `row`. Rejected where it has no text."""
    text, name = row.pop(source.fields.text, None), source.fields.id or "id"
    if text is None:
        raise Rejected("missing field", f"no {source.fields.text!r} among {', '.join(map(str, row)) or 'no fields'}")
    owner = row.get(name)
    if isinstance(owner, str | int) and not isinstance(owner, bool):
        del row[name]
    elif source.fields.id is None:
        owner = None
    elif owner is None:
        raise Rejected("missing field", f"no {name!r}")
    else:
        raise Rejected("wrong type", f"{name!r} is a {type(owner).__name__}, not a string or integer")
    if source.meta is not None:
        row = {name: row[name] for name in source.meta if name in row}
    return Record(number, _encode(text, source), None if owner is None else _clean(str(owner)), _meta(row))


def _encode(text: Any, source: SourceConfig) -> bytes:
    """The text's bytes. Rejected where it is no text, blank or too long."""
    if isinstance(text, bytes):
        text = _utf8(text)
    if not isinstance(text, str):
        raise Rejected("wrong type", f"{source.fields.text!r} is a {type(text).__name__}, not a string")
    if not text or text.isspace():
        raise Rejected("empty text", f"{len(text)} characters, all white space")
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = _clean(text).encode()
    if len(data) > source.max_record:
        raise Rejected("record too long", f"{len(data):,} bytes of text; max_record_mb is {source.max_record_mb:g}")
    return data


def _clean(text: str) -> str:
    """Lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    return _SURROGATE.sub("\ufffd", text)


_decoder = json.JSONDecoder(parse_constant=lambda _: None)  # JSON has no NaN: null


def _plain(value: Any) -> Any:
    """What JSON has no type for (dates, decimals, bytes), as a string."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


_dump = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False, check_circular=False, default=_plain
).encode


def _meta(row: dict[str, Any]) -> str:
    if not row:
        return "{}"
    try:
        meta = _dump(row)
    except ValueError:  # an infinite number, or one that is none
        meta = _dump(_decoder.decode(json.dumps(row, default=_plain)))
    return meta if meta.isascii() else _clean(meta)


def _text(file: BinaryIO, path: str, source: SourceConfig) -> Iterator[Record | Bad]:
    """One document: the whole file, or a package's description."""
    data = bytearray()
    for block in blocks(file, path):
        data += block
        if len(data) > source.max_record:
            yield _bad(0, Rejected("record too long", f"max_record_mb is {source.max_record_mb:g}"), bytes(data[:800]))
            return
    content = bytes(data).removeprefix(BOM)
    identifier = None
    try:
        if source.kind != "text" and b"\0" in content[:BINARY_PROBE]:
            raise Rejected("binary file", f"NUL byte at {content.index(0)}")
        text = _utf8(content)
        if source.kind == "python-installation":
            identifier = python_installation.identifier(path)
            if python_installation.classify(identifier) == "readme":
                text = python_installation.description(text)
        yield Record(0, _encode(text, source), identifier or path, "{}")
    except Rejected as why:
        yield _bad(0, why, content)


def _parquet(file: BinaryIO, path: str, source: SourceConfig) -> Iterator[Record | Bad]:
    with _arrow_errors():
        parquet = pq.ParquetFile(file, pre_buffer=False)
        rows = max(1, parquet.metadata.num_rows)
        size = sum(parquet.metadata.row_group(g).total_byte_size for g in range(parquet.metadata.num_row_groups))
        batch_size = max(1, min(4096, BATCH_BYTES * rows // max(1, size)))
        names = parquet.schema_arrow.names
    _need_text(names, source)
    first = 0
    for group in range(parquet.num_row_groups):  # one by one: damage costs the rest of its own group only
        batches = parquet.iter_batches(batch_size, [group], _columns(names, source))
        number = first
        first += parquet.metadata.row_group(group).num_rows
        try:
            for found in _rows(batches, source, number):
                number = found.record + 1
                yield found
        except Unreadable as error:
            lost = (
                f"row group {group}, its last {first - number} of {parquet.metadata.row_group(group).num_rows} records"
            )
            yield Bad(number, error.reason, f"{lost}: {error.detail}", "")


def _arrow(file: BinaryIO, path: str, source: SourceConfig) -> Iterator[Record | Bad]:
    """An Arrow IPC file or stream. The file format is a stream between two magic words, so both are read as streams."""
    is_file = file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC
    if is_file:
        file.seek(-len(_ARROW_MAGIC), 2)
        complete = file.read() == _ARROW_MAGIC
    file.seek(8 if is_file else 0)
    with _arrow_errors():
        stream = pa.ipc.open_stream(pa.PythonFile(file, mode="r"))
        names = stream.schema.names
    _need_text(names, source)
    yield from _rows(stream, source)
    if is_file and not complete:
        raise Unreadable("truncated archive", "the Arrow file ends without its footer")


def _columns(names: list[str], source: SourceConfig) -> list[str] | None:
    """The columns to read; None for all."""
    if source.meta is None:
        return None
    wanted = {source.fields.text, source.fields.id or "id", *source.meta}
    return [name for name in names if name in wanted]


def _need_text(names: list[str], source: SourceConfig) -> None:
    if source.fields.text not in names:
        raise Unreadable("missing field", f"no column {source.fields.text!r} among {', '.join(names)}")


def _rows(batches: Iterator[pa.RecordBatch], source: SourceConfig, number: int = 0) -> Iterator[Record | Bad]:
    """Records of a columnar file, from record `number` on."""
    while True:
        with _arrow_errors():
            batch = next(batches, None)
        if batch is None:
            return
        step = max(1, min(len(batch), BATCH_BYTES * len(batch) // max(1, batch.get_total_buffer_size())))
        for start in range(0, len(batch), step):
            with _arrow_errors():
                rows = _to_rows(batch.slice(start, step))
            for row in rows:
                try:
                    yield _bad(number, row, b"") if isinstance(row, Rejected) else _record(number, row, source)
                except Rejected as why:
                    yield _bad(number, why, str(row)[:800].encode("utf-8", "replace"))
                number += 1


def _to_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | Rejected]:
    """The rows, or why one has a value that nothing here can hold."""
    try:
        batch.validate(full=True)  # to use values that point outside their buffers would end the process
        columns = [_values(column) for column in batch.columns]
        return [dict(zip(batch.schema.names, values, strict=True)) for values in zip(*columns, strict=True)]
    except _UNFIT as error:
        if len(batch) > 1:  # one by one, so that no row depends on its neighbours
            return [row for i in range(len(batch)) for row in _to_rows(batch.slice(i, 1))]
        return [Rejected("invalid UTF-8" if "UTF8" in str(error) else "unreadable value", str(error))]


def _values(column: pa.Array) -> list[Any]:
    """The values of a column; a single one that Python cannot hold (a date after the year 9999) as a string."""
    try:
        return column.to_pylist()
    except _UNFIT:
        if len(column) > 1:
            raise
    if pa.types.is_timestamp(column.type) and column.type.tz:
        column = column.view(pa.timestamp(column.type.unit, "UTC"))  # the zone itself may be unknown
    return column.cast(pa.string()).to_pylist()


@contextlib.contextmanager
def _arrow_errors() -> Iterator[None]:
    """What Arrow says of a damaged file, as Unreadable. Errors of the disk or the network pass: they bear an errno."""
    try:
        yield
    except (pa.ArrowException, MemoryError, SystemError, IndexError, UnicodeDecodeError) as error:
        raise Unreadable("unreadable file", str(error) or type(error).__name__) from error
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        raise Unreadable("unreadable file", str(error)) from error
