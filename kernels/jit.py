"""`njit` for every CPU kernel: compiled once, cached outside the package.

A submitted Ray job runs in a temporary copy of the checkout, so a cache keyed by the source's path would be lost
each time. Here the cache directory is keyed by the *content* of all kernel files (a kernel inlines others, and numba
does not notice when only the callee changed).
"""

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import numba
from numba.core import caching
from numba.core import config as numba_config

config: Any = numba_config


def _content_key() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


class ContentLocator(caching.UserProvidedCacheLocator):
    """Place cached kernels by content, whatever directory the checkout lies in."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        return _content_key()


def _cache_directory() -> str:
    """The user's cache directory; where it cannot be written, one that lasts as long as the process."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trivium" / "numba"
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError:
        # Cached kernels are pickles: a shared directory that others can write is no place for them.
        return tempfile.mkdtemp(prefix="trivium-numba-")
    return str(path)


config.CACHE_DIR = config.CACHE_DIR or _cache_directory()
config.CACHE_LOCATOR_CLASSES = f"{ContentLocator.__module__}.{ContentLocator.__qualname__}"

njit: Any = functools.partial(numba.njit, cache=True, nogil=True)
