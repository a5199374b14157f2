"""A cache of whole shards from remote storage on a local disk: bounded, shared by the processes of a machine."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from dataprep.storage import TEMPORARY, Commit, UserError, checksum, filesystem


@dataclass(frozen=True)
class ShardCache:
    """Files named by their checksums; the longest unused go when `max_bytes` would be exceeded.

    One download at a time on a machine: its ranks read slices of the same batches and so want the same shard.
    """

    directory: str
    max_bytes: int

    def open(self, commit: Commit, name: str) -> pa.MemoryMappedFile:
        """The commit's file with this logical name, brought here if need be. It may be removed while it is mapped.

        Raises UserError where the cache is too small for it, OSError where it cannot be fetched.
        """
        about, path = commit.files[name], self._path(commit, name)
        if about["bytes"] > self.max_bytes:
            raise UserError(
                f"the cache {self.directory} may hold {self.max_bytes:,} bytes, but {commit.path(name)} has "
                f"{about['bytes']:,}; allow at least twice that"
            )
        with self._alone():
            if not path.exists():
                self._evict(self.max_bytes - about["bytes"])
                self._fetch(commit.path(name), path)
            os.utime(path)
            return pa.memory_map(str(path))

    def discard(self, commit: Commit, name: str) -> None:
        """Forget a file if the copy here is damaged."""
        with self._alone(), contextlib.suppress(FileNotFoundError):
            if checksum(str(path := self._path(commit, name))) != commit.files[name]["xxh3"]:
                path.unlink()

    def _path(self, commit: Commit, name: str) -> Path:
        return Path(self.directory) / f"{commit.files[name]['xxh3']}.arrow"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """The lock ends with the process, however that ends."""
        Path(self.directory).mkdir(parents=True, exist_ok=True)
        with open(Path(self.directory) / ".lock", "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _fetch(self, url: str, path: Path) -> None:
        temporary = path.with_name(TEMPORARY + path.name)
        fs, remote = filesystem(url)
        fs.invalidate_cache()  # of listings older than the shard
        fs.get_file(remote, str(temporary))
        os.replace(temporary, path)

    def _evict(self, limit: int) -> None:
        """Remove what killed downloads left, and the longest unused until at most `limit` bytes are left."""
        files = [f for f in Path(self.directory).iterdir() if f.name != ".lock"]
        kept = 0
        for file in sorted(files, key=lambda f: f.stat().st_mtime_ns, reverse=True):
            size = 0 if file.name.startswith(TEMPORARY) else file.stat().st_size
            kept += size
            if kept > limit or not size:
                file.unlink()
