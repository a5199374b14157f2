"""From input files to corpus partitions: one task reads a group of files and writes documents and quarantine."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from dataprep import manifest
from dataprep.config import CorpusConfig, SourceConfig
from dataprep.manifest import Entry
from dataprep.readers import Bad, Record, read_records
from dataprep.storage import Attempt, UserError, explain_os_error

DOCUMENTS = pa.schema(
    [
        ("doc", pa.uint64()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("text", pa.large_string()),
        ("id", pa.string()),
        ("origin", pa.string()),
        ("content_hash", pa.binary(16)),
        ("meta", pa.string()),
    ]
)
QUARANTINE = pa.schema(
    [
        ("source", pa.string()),
        ("path", pa.string()),
        ("record", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("excerpt", pa.string()),
    ]
)
RECORD_BITS = 40
ROW_GROUP_BYTES = 16e6
ROW_GROUP_ROWS = 1 << 16


def build_group(out: Attempt, entries: list[Entry], source: SourceConfig, config: CorpusConfig) -> dict[str, Any]:
    """Read the files of one group into `documents-00000`, `documents-00001`, ... and, if need be, `quarantine`.

    Returns the aggregates: documents and bytes (UTF-8 text) by source, quarantined by source and reason.
    UserError where a file is no longer the one that was listed.
    """
    count: Counter[str] = Counter()
    size: Counter[str] = Counter()
    bad: dict[str, Counter[str]] = {}
    with (
        _writer(out, "quarantine", QUARANTINE, config.zstd_level) as quarantine,
        _writer(out, "documents-{:05}", DOCUMENTS, config.zstd_level, config.partition_mb * 1e6) as documents,
    ):
        for entry in entries:
            _check(entry)
            for found in read_records(entry.path, source):
                if isinstance(found, Bad):
                    quarantine.add((entry.source, entry.path, *found), len(found.excerpt))
                    bad.setdefault(entry.source, Counter())[found.reason] += 1
                else:
                    documents.add(_document(entry, found), len(found.text) + len(found.meta))
                    count[entry.source] += 1
                    size[entry.source] += len(found.text)
    return {"documents": dict(count), "bytes": dict(size), "quarantined": {label: dict(r) for label, r in bad.items()}}


def content_hash(text: bytes) -> bytes:
    """xxh3-128 of a text whose line ends are folded to one newline; nothing else is."""
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return xxhash.xxh3_128_digest(text)


def _document(entry: Entry, found: Record) -> tuple[Any, ...]:
    origin = f"{entry.path}:{found.record}"
    return (
        entry.file << RECORD_BITS | found.record,
        entry.source,
        found.text,
        origin if found.id is None else found.id,
        origin,
        content_hash(found.text),
        found.meta,
    )


def _check(entry: Entry) -> None:
    try:
        _, version = manifest.inspect(entry.path)
    except FileNotFoundError:
        version = "none"
    except OSError as error:
        raise explain_os_error(error) or error from error
    if version != entry.version:
        raise UserError(f"{entry.path} was changed or removed after the run had listed it; run the same command again")


class _Writer:
    """Rows into Parquet files of about `file_bytes`, row group by row group; no file where there are no rows."""

    def __init__(
        self, stack: contextlib.ExitStack, out: Attempt, name: str, schema: pa.Schema, level: int, file_bytes: float
    ):
        self.stack, self.out, self.name, self.schema, self.level = stack, out, name, schema, level
        self.file_bytes, self.group_bytes = file_bytes, min(ROW_GROUP_BYTES, file_bytes)
        self.rows: list[tuple[Any, ...]] = []
        self.rows_bytes = self.written = self.files = 0
        self.parquet: pq.ParquetWriter | None = None

    def add(self, row: tuple[Any, ...], size: int) -> None:
        """Add a row of about `size` bytes."""
        self.rows.append(row)
        self.rows_bytes += size
        if self.rows_bytes >= self.group_bytes or len(self.rows) == ROW_GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        self.parquet = self.parquet or self._open()
        columns = [
            _array(values, field.type) for values, field in zip(zip(*self.rows, strict=True), self.schema, strict=True)
        ]
        self.parquet.write_table(pa.table(columns, self.schema), row_group_size=ROW_GROUP_ROWS)
        self.written += self.rows_bytes
        self.rows, self.rows_bytes = [], 0
        if self.written >= self.file_bytes:
            self.stack.close()
            self.parquet, self.written, self.files = None, 0, self.files + 1

    def _open(self) -> pq.ParquetWriter:
        path = self.stack.enter_context(self.out.file(self.name.format(self.files), ".parquet"))
        options = {"compression": "zstd", "compression_level": self.level}
        writer = pq.ParquetWriter(path, self.schema, use_dictionary=["source"], write_statistics=False, **options)
        return self.stack.enter_context(writer)


@contextlib.contextmanager
def _writer(
    out: Attempt, name: str, schema: pa.Schema, level: int, file_bytes: float = float("inf")
) -> Iterator[_Writer]:
    with contextlib.ExitStack() as stack:
        writer = _Writer(stack, out, name, schema, level, file_bytes)
        yield writer
        writer.flush()


def _array(values: tuple[Any, ...], type: pa.DataType) -> pa.Array:
    if pa.types.is_large_string(type):  # valid UTF-8 already: no second look at every byte
        return pa.array(values, pa.large_binary()).view(type)
    return pa.array(values, type)
