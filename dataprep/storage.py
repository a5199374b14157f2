"""Files wherever fsspec reaches, written whole or not at all, and the commit that makes a partition exist.

A partition's files are written by an `Attempt`: under a temporary name first, then under a name that holds their
checksum. Two attempts at the same work therefore write the same names and bytes, and neither can spoil the other.
One small JSON file, the `Commit`, then makes them visible: by rename on a local disk, by one PUT on an object store.
"""

import contextlib
import errno
import glob
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

COMMIT = ".commit.json"
TEMPORARY = ".tmp-"
NAMED = re.compile(r"\.([0-9a-f]{12})\.[a-z.]+$")  # the checksum in the name of an attempt's file


class UserError(Exception):
    """A mistake the user can mend: shown as one line (what, where, what to do), without a stack trace."""


class WrongURL(UserError, ValueError):
    """No file system for a URL; a ValueError too, so that those who know which key names it can say so."""


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def absolute(path: str) -> str:
    """A local path made absolute, `~` and `file://` resolved; a URL as it is. Without a slash at its end."""
    if is_local(path):
        path = os.path.abspath(os.path.expanduser(path.removeprefix("file://")))
    return path.rstrip("/")


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path as it spells it. UserError where there is none."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise WrongURL(f"cannot use {path}: {error}; correct the URL, or install what it needs") from None


def join(base: str, *names: str) -> str:
    return "/".join([base.rstrip("/"), *names])


def exists(path: str) -> bool:
    fs, name = filesystem(path)
    return fs.exists(name)


def expand(pattern: str) -> list[str]:
    """The files that match a path, directory or glob pattern, sorted; with the URL's scheme kept.

    A pattern that is itself the name of a file or directory means that one; of a directory it means all files below,
    but for hidden files and folders.
    """
    if is_local(pattern):
        pattern = absolute(pattern)
        if os.path.isdir(pattern):
            return sorted(_below(pattern, ()))
        found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        return sorted(f for f in found if os.path.isfile(f))
    fs, name = filesystem(pattern)
    if glob.has_magic(pattern) and not fs.exists(name):
        found = [f for f in fs.glob(name) if fs.isfile(f)]
    elif fs.isdir(name):
        found = [f for f in fs.find(name) if "/." not in f[len(name.rstrip("/")) :]]
    else:
        found = [name] if fs.isfile(name) else []
    return sorted(fs.unstrip_protocol(f) for f in found)


def _below(directory: str, above: tuple[str, ...]) -> Iterator[str]:
    """Files below a local directory, through links too, but not round a loop of them."""
    real = os.path.realpath(directory)
    for item in os.scandir(directory) if real not in above else ():
        if item.is_dir() and not item.name.startswith("."):
            yield from _below(item.path, (*above, real))
        elif not item.name.startswith("."):
            yield item.path


def read_bytes(path: str) -> bytes:
    """A whole file, a small one: on an object store one GET, past any listing that its client keeps. UserError where
    it is not the file that was committed."""
    check(path)
    if not is_local(path):
        fs, name = filesystem(path)
        return fs.cat_file(name)
    with open_file(path) as file:
        return file.read()


def read_json(path: str, /, **shape: type) -> Any:
    """The JSON value in a file, or None where there is no such file. UserError where it is no JSON or, if keys and the
    types of their values are given, no object that has these."""
    try:
        value = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path} is damaged: no JSON any more; remove it and run the same command again") from None
    odd = [key for key, kind in shape.items() if not isinstance(value, dict) or not isinstance(value.get(key), kind)]
    if odd:
        raise UserError(f"{path} is damaged: it has no {', no '.join(odd)}; remove it and run the job that writes it")
    return value


def latest(root: str, step: str) -> str | None:
    """The directory of a step's newest output, as `latest/STEP.json` says; None where there is none yet."""
    pointer = read_json(join(root, "latest", f"{step}.json"), directory=str)
    return pointer and join(root, pointer["directory"])


def open_file(path: str) -> BinaryIO:
    """A readable, seekable binary file."""
    if is_local(path):
        return open(path.removeprefix("file://"), "rb")
    fs, name = filesystem(path)
    return fs.open(name, "rb")


def arrow_file(path: str) -> pa.NativeFile:
    """The same for Arrow's readers: memory-mapped where it can be."""
    if is_local(path):
        return pa.memory_map(path.removeprefix("file://"))
    return pa.PythonFile(open_file(path), mode="r")


@contextlib.contextmanager
def _temporary(path: str, suffix: str = "") -> Iterator[str]:
    """A local file to write, beside `path` if that is local; it is gone when the block ends."""
    folder = Path(path.removeprefix("file://")).parent if is_local(path) else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{TEMPORARY}{uuid.uuid4().hex}{suffix}"
    try:
        yield str(temporary)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _place(temporary: str, path: str) -> None:
    """Make a local file `path`, whole or not at all: by rename or by one PUT."""
    if is_local(path):
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path.removeprefix("file://"))
    else:
        fs, name = filesystem(path)
        fs.put_file(temporary, name)


def write_bytes(path: str, data: bytes) -> None:
    """Write a small file atomically: temporary file and rename, or one PUT."""
    with _temporary(path) as temporary:
        Path(temporary).write_bytes(data)
        _place(temporary, path)


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value that fingerprints and byte comparisons rest on."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()


def write_json(path: str, value: Any) -> None:
    write_bytes(path, json.dumps(value, sort_keys=True, ensure_ascii=False, indent=1).encode() + b"\n")


def ensure_json(path: str, value: Any) -> None:
    """Write a JSON file unless it holds just this value already."""
    try:
        there = read_json(path)
    except UserError:
        there = None
    if there is None or canonical_json(there) != canonical_json(value):
        write_json(path, value)


def add_up(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The sum of several aggregates: mappings of counts, or of such mappings, key by key."""
    total: dict[str, Any] = {}
    for part in parts:
        _add(total, part)
    return total


def _add(total: dict[str, Any], part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict):
            _add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


def fingerprint(value: Any) -> str:
    """32 hexadecimal digits that stand for a JSON value."""
    return xxhash.xxh3_128_hexdigest(canonical_json(value))


def remove(path: str) -> None:
    """Remove a file or a directory with all in it; nothing happens where there is none."""
    fs, name = filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(name, recursive=True)


def sizes(directory: str) -> dict[str, int]:
    """Name -> bytes of the files directly in a directory; empty where there is no directory."""
    fs, name = filesystem(directory)
    fs.invalidate_cache(name)
    try:
        entries = fs.ls(name, detail=True)
    except FileNotFoundError:
        return {}
    return {e["name"].rstrip("/").rsplit("/", 1)[-1]: e["size"] or 0 for e in entries if e["type"] == "file"}


def checksum(path: str) -> str:
    """The xxh3-128 of a local file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path.removeprefix("file://"), "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Commit:
    """What one partition of a step holds. Two runs over the same input write the same commit, byte for byte.

    key: the partition's name. inputs: what it was made from, name -> fingerprint. files: logical name ->
    {name, bytes, xxh3}. aggregates: counts and histograms, so that nobody has to read documents to sum them up.
    """

    key: str
    inputs: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    aggregates: dict[str, Any] = field(default_factory=dict)
    directory: str = field(default="", compare=False)

    def path(self, name: str) -> str:
        """The full path of the file with this logical name."""
        return join(self.directory, self.files[name]["name"])

    @property
    def fingerprint(self) -> str:
        """Stands for the content, whatever it was made from: a step that reads it need not run again if the same."""
        return fingerprint([self.key, self.files, self.aggregates])

    @property
    def bytes(self) -> int:
        return sum(f["bytes"] for f in self.files.values())

    @classmethod
    def load(cls, directory: str, key: str) -> "Commit | None":
        """The commit of a partition; None where there is none, or a damaged one: then the partition is made again."""
        try:
            value = read_json(join(directory, key + COMMIT), key=str, inputs=dict, files=dict, aggregates=dict)
            return None if value is None else cls(**value, directory=directory)
        except (UserError, TypeError):
            return None


class Attempt:
    """One attempt at a partition: write its files, then `commit`. Until then, nobody sees any of them."""

    def __init__(self, directory: str, key: str, inputs: dict[str, str]):
        self.directory, self.key, self.inputs = directory, key, inputs
        self.files: dict[str, dict[str, Any]] = {}

    @contextlib.contextmanager
    def file(self, name: str, suffix: str, plain: bool = False) -> Iterator[str]:
        """A local path to write the file `name` to; `suffix` (".parquet") ends its final name.

        plain: the final name is the key and the suffix alone, without a checksum: for formats whose files belong
        together by name.
        """
        with _temporary(join(self.directory, self.key), suffix) as temporary:
            yield temporary
            digest = checksum(temporary)
            final = self.key + suffix if plain else f"{self.key}.{name}.{digest[:12]}{suffix}"
            self.files[name] = {"name": final, "bytes": os.path.getsize(temporary), "xxh3": digest}
            _place(temporary, join(self.directory, final))

    def table(self, name: str, table: pa.Table) -> None:
        """Write a table as zstd Parquet."""
        with self.file(name, ".parquet") as path:
            pq.write_table(table, path, compression="zstd", row_group_size=1 << 16)

    def arrow(self, name: str, tables: Iterable[pa.Table], schema: pa.Schema, compression: str = "zstd") -> None:
        """Write tables as one Arrow IPC file: quick to read back, and fit for large binary columns."""
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with self.file(name, ".arrow") as path, pa.ipc.new_file(path, schema, options=options) as writer:
            for table in tables:
                writer.write_table(table)

    def commit(self, aggregates: dict[str, Any]) -> Commit:
        """Make the partition exist."""
        value: dict[str, Any] = {"key": self.key, "inputs": self.inputs, "files": self.files, "aggregates": aggregates}
        write_bytes(join(self.directory, self.key + COMMIT), canonical_json(value) + b"\n")
        return Commit(**value, directory=self.directory)


def read_table(path: str, columns: list[str] | None = None) -> pa.Table:
    """A Parquet or Arrow IPC file as a table. UserError where it is not the file that was committed."""
    check(path)
    with arrow_file(path) as file:
        if path.endswith(".parquet"):
            return pq.read_table(file, columns=columns)
        if columns is None:
            return pa.ipc.open_file(file).read_all()
        wanted = [pa.ipc.open_file(file).schema.get_field_index(name) for name in columns]
        table = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=wanted)).read_all()
    return table.select(columns)  # in the order asked for


def read_groups(path: str, columns: list[str]) -> Iterator[pa.Table]:
    """The row groups of a Parquet file, one after the other: memory stays at one. UserError as `read_table`."""
    check(path)
    with arrow_file(path) as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group, columns)


def check(path: str) -> None:
    """Compare a local file of ours with the checksum in its name. (An object store keeps its own.)"""
    if (named := NAMED.search(path)) and is_local(path) and not checksum(path).startswith(named[1]):
        raise UserError(f"{path} is damaged: its checksum differs; remove it and run the same command again")


def explain_os_error(error: OSError) -> UserError | None:
    """A full disk or a forbidden path in the user's words; None for an error that is not theirs to mend."""
    where = error.filename or "the output directory"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left while writing {where}; free some and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission for {where}; make it accessible or choose another path")
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return UserError(f"cannot use {where}: {os.strerror(error.errno)}; choose another path")
    return None


def binary_array(data: np.ndarray, offsets: np.ndarray) -> pa.LargeBinaryArray:
    """A large_binary array over bytes `data` (uint8) cut at `offsets` (int64, one more than values). No copy."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(offsets, np.int64)), pa.py_buffer(np.ascontiguousarray(data))]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def array_buffers(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(bytes uint8, offsets int64) of a large_string or large_binary column, as the kernels read them.

    The offsets start where the first value starts, which need not be 0. Nulls are not allowed.
    """
    array = column
    if isinstance(column, pa.ChunkedArray):
        array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if not (pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)) or array.null_count:
        raise TypeError(f"need a large_string or large_binary column without nulls, not {array.type}")
    _, offsets, data = array.buffers()
    if offsets is None or offsets.size == 0:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    view = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8), view


def runs(offsets: np.ndarray, size: int) -> Iterator[tuple[int, int]]:
    """(first, behind the last) of consecutive values of at most `size` bytes together, or one longer value."""
    start = 0
    while start < len(offsets) - 1:
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + size, "right")) - 1)
        yield start, stop
        start = stop


def hash_halves(column: pa.ChunkedArray) -> np.ndarray:
    """uint64[values, 2] of a fixed_size_binary[16] column without nulls."""
    data, offsets = array_buffers(column.cast(pa.large_binary()))
    return data[offsets[0] : offsets[-1]].view(np.uint64).reshape(-1, 2)
