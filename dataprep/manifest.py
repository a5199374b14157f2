"""The append-only list of input files: what numbers documents for ever and says which files one task reads."""

import contextlib
import fnmatch
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from dataprep import python_installation, readers
from dataprep.config import CorpusConfig, SourceConfig
from dataprep.storage import (
    UserError,
    canonical_json,
    exists,
    expand,
    filesystem,
    is_local,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
)

MAX_FILES = 1 << 24

# What tells two versions of a remote file apart, best first, as the various file systems spell it.
_ETAGS = (
    "ETag", "etag", "blob_id", "md5Hash", "content_md5", "mtime", "LastModified", "last_modified", "updated", "created",
)  # fmt: skip


@dataclass(frozen=True)
class InputFile:
    """A file that is there now. source: the label its documents will bear. version: size and time or ETag."""

    source: str
    path: str
    bytes: int
    version: str


@dataclass(frozen=True)
class Entry(InputFile):
    """A file that was there once. file: its number, in every `doc` of it. group: the files read by the same task."""

    file: int
    group: int


def list_inputs(config: CorpusConfig) -> list[InputFile]:
    """The files of all sources, always in the same order. UserError where a path matches nothing or cannot be read."""
    return [file for source in config.sources for file in _source_inputs(source)]


def update(
    manifest: Sequence[Entry], inputs: Sequence[InputFile], group_bytes: float
) -> tuple[list[Entry], list[Entry]]:
    """Append what is new; return the whole manifest and the entries whose file is there now in that version.

    New files form new groups: each of one source, filled in order up to about `group_bytes`.
    """
    entries = list(manifest)
    known = {(e.source, e.path, e.version) for e in entries}
    group = max((e.group for e in entries), default=-1)
    filling, filled = None, 0.0
    for new in inputs:
        if (new.source, new.path, new.version) in known:
            continue
        if len(entries) == MAX_FILES:
            raise UserError(
                f"the corpus has had {MAX_FILES:,} input files, as many as have numbers; {new.path} is one more; "
                "join small files into larger ones (JSONL, Parquet) and start a new corpus"
            )
        if new.source != filling or filled + new.bytes > group_bytes:
            group, filling, filled = group + 1, new.source, 0.0
        filled += new.bytes
        entries.append(Entry(**asdict(new), file=len(entries), group=group))
    present = {(i.source, i.path, i.version) for i in inputs}
    return entries, [e for e in entries if (e.source, e.path, e.version) in present]


def groups(active: Sequence[Entry]) -> dict[int, list[Entry]]:
    """Group number -> its entries, both in order."""
    found: dict[int, list[Entry]] = {}
    for entry in sorted(active, key=lambda e: e.file):
        found.setdefault(entry.group, []).append(entry)
    return found


def load(path: str) -> list[Entry]:
    """The manifest in a file; empty where there never was one. UserError where what was written there is gone."""
    lines = read_bytes(path).splitlines(keepends=True) if exists(path) else []
    written = read_json(_check(path), files=int, xxh3=str) or {"files": 0, "xxh3": _digest([])}
    if _digest(lines[: written["files"]]) != written["xxh3"]:
        raise UserError(
            f"{path} has {len(lines)} lines, not all of the {written['files']} that were written there: without them "
            "the documents under this root cannot be told apart; restore it from a copy, or choose another --root"
        )
    try:
        entries = [Entry(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a corpus manifest ({error}); restore it or start a new corpus") from error
    if [e.file for e in entries] != list(range(len(entries))):
        raise UserError(f"{path} has lost lines: file numbers must count from 0; restore it or start a new corpus")
    return entries


def save(path: str, manifest: Sequence[Entry]) -> None:
    """Write what has grown, then how much there must be from now on. Killed between the two, the next call goes on."""
    written = read_json(_check(path), files=int)
    if written and written["files"] == len(manifest):
        return
    lines = [canonical_json(asdict(entry)) + b"\n" for entry in manifest]
    write_bytes(path, b"".join(lines))
    write_json(_check(path), {"files": len(lines), "xxh3": _digest(lines)})


def _check(path: str) -> str:
    """The file beside a manifest that says how many lines it had when it last grew, and their checksum."""
    return path.removesuffix(".jsonl") + ".check.json"


def _digest(lines: Sequence[bytes]) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(lines))


def inspect(path: str) -> tuple[int, str]:
    """(bytes, version) of a file. OSError where it is missing or unreadable."""
    if is_local(path):
        path = path.removeprefix("file://")
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or not os.access(path, os.R_OK):
            raise PermissionError("not a file, or no permission to read it")
        return found.st_size, f"{found.st_size}-{found.st_mtime_ns}"
    fs, name = filesystem(path)
    info: dict[str, Any] = fs.info(name)
    tag = next((str(info[key]).strip('"') for key in _ETAGS if info.get(key)), "")
    return int(info.get("size") or 0), f"{info.get('size')}-{tag}"


def _source_inputs(source: SourceConfig) -> list[InputFile]:
    def wanted(path: str) -> bool:
        return (not source.include or _matches(path, source.include)) and not _matches(path, source.exclude)

    if source.kind == "python-installation":
        parts = python_installation.list_files(source.max_bytes, wanted)
        return [_input(f"{source.name}-{part}", path, source) for part, path in parts]
    found: set[str] = set()
    for pattern in source.paths:
        with _named(source, f"cannot list {pattern!r}", pattern, "correct it in `paths`"):
            paths = [path for path in expand(pattern) if wanted(path)]
        if not paths:
            raise UserError(f"source {source.name!r}: {pattern!r} matches no file; correct or remove it in `paths`")
        found.update(paths)
    return [_input(source.name, path, source) for path in sorted(found)]


def _matches(path: str, globs: Sequence[str]) -> bool:
    """Whether a path, or what is left of it after some folder, matches one of the globs."""
    return any(fnmatch.fnmatchcase(path, g) or fnmatch.fnmatchcase(path, "*/" + g) for g in globs)


def _input(label: str, path: str, source: SourceConfig) -> InputFile:
    try:
        readers.kind_of(path, source)  # a file that nobody can read is an error now, not later in a task
    except ValueError as error:
        todo = "set the source's `kind` or leave the file out with `exclude`"
        raise UserError(f"source {source.name!r}: {error}; {todo}") from None
    with _named(source, f"cannot read {path!r}", path, "mend it or `exclude` it"):
        path.encode()
        size, version = inspect(path)
    return InputFile(label, path, size, version)


@contextlib.contextmanager
def _named(source: SourceConfig, what: str, path: str, todo: str) -> Iterator[None]:
    """Any refusal of a file system as one UserError. Those behind URLs raise whatever their libraries do."""
    try:
        yield
    except Exception as error:
        if is_local(path) and not isinstance(error, (OSError, UnicodeEncodeError)):
            raise
        if isinstance(error, ImportError):
            todo = "install the package that it names"
        elif not is_local(path):
            todo = f"check the URL, the credentials and the connection, or {todo}"
        detail = str(error) or type(error).__name__
        raise UserError(f"source {source.name!r}: {what} ({detail}); {todo}") from error
