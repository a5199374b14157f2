"""The running Python's own files as sources: READMEs, documentation, licences and code of the library and packages.

Real text with real duplicates (vendored packages, licence files) that needs no download.
"""

import functools
import importlib.metadata
import json
import math
import os
import re
import sysconfig
from collections.abc import Callable, Iterator

import xxhash

# Sub-source -> its share of a byte limit; what one leaves goes to those after it.
PARTS = {"readme": 1 / 8, "licence": 1 / 8, "docs": 1 / 4, "code": 1.0}

_LICENCE = re.compile(r"(LICEN[SC]E|COPYING|NOTICE)[^/]*", re.IGNORECASE)
_DOCS = {".md", ".rst", ".txt"}
_SKIPPED = {"__pycache__", "site-packages", "dist-packages"}  # packages are walked from their own roots
_DATA = {"test", "tests", "testdata", "test_data", "data", "datasets"}  # .txt files there are seldom prose


@functools.cache
def roots() -> dict[str, str]:
    """Real directory -> the name that ids begin with: `stdlib` or `site-packages`."""
    paths = [("stdlib", "stdlib"), ("site-packages", "purelib"), ("site-packages", "platlib")]
    return {os.path.realpath(sysconfig.get_path(kind)): name for name, kind in paths}


def list_files(max_bytes: int | None, wanted: Callable[[str], bool] = lambda path: True) -> list[tuple[str, str]]:
    """(sub-source, path) of the installation's files, in an order that is the same wherever it is installed.

    max_bytes limits the size of all files together, wanted says which paths to consider. The order is that of a hash
    of the last two path components: vendored copies of one file are taken together and every package has a chance.
    """
    sizes: dict[str, dict[str, int]] = {part: {} for part in PARTS}
    own = _local_projects()
    for root, name in roots().items():
        for path in filter(wanted, _walk(root)):
            part = classify(name + path.removeprefix(root).replace(os.sep, "/"))
            size = os.stat(path).st_size
            if part and size and path not in own:
                sizes[part][path] = size
    chosen: list[tuple[str, str]] = []
    left = limit = math.inf if max_bytes is None else max_bytes
    for part, share in PARTS.items():
        room = min(left, share * limit)
        for path in sorted(sizes[part], key=_hash_order):
            if (size := sizes[part][path]) <= room:
                chosen.append((part, path))
                room, left = room - size, left - size
    return chosen


def _hash_order(path: str) -> tuple[int, str]:
    path = identifier(path)  # not the machine's prefix, or the order would be this machine's
    return xxhash.xxh3_64_intdigest("/".join(path.split("/")[-2:]).encode()), path


def identifier(path: str) -> str:
    """The path without the machine's prefix: `site-packages/pip/_vendor/...`; unchanged outside the installation."""
    for root, name in sorted(roots().items(), key=lambda item: -len(item[0])):
        if path.startswith(root + os.sep):
            return name + path.removeprefix(root).replace(os.sep, "/")
    return path


def classify(identifier: str) -> str | None:
    """The sub-source of a file, or None for one that is not text to read."""
    *folders, name = identifier.split("/")
    suffix = os.path.splitext(name)[1]
    package_info = folders[-1].endswith((".dist-info", ".egg-info"))
    if package_info and name == "METADATA":
        return "readme"
    if suffix == ".py":
        return "code"
    if _LICENCE.fullmatch(name) and (suffix in _DOCS or not suffix or suffix.isupper()):
        return "licence"
    if suffix in _DOCS and not (suffix == ".txt" and (package_info or _DATA.intersection(folders))):
        return "docs"
    return None


def description(metadata: str) -> str:
    """The README inside a METADATA file: what follows the headers."""
    _headers, *body = re.split(r"\r?\n\r?\n", metadata, maxsplit=1)
    return "".join(body)


def _walk(root: str) -> Iterator[str]:
    """Readable regular files below a directory; links to directories are not followed."""
    for directory, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED and not f.startswith(".")]
        for name in names:
            path = os.path.join(directory, name)
            if os.path.isfile(path) and os.access(path, os.R_OK):
                yield path


def _local_projects() -> set[str]:
    """Files of projects installed from a directory of this machine, editable or not, such as this very project."""
    found: set[str] = set()
    for package in importlib.metadata.distributions(path=list(roots())):
        if "dir_info" in json.loads(package.read_text("direct_url.json") or "{}"):
            found |= {os.path.realpath(str(package.locate_file(f))) for f in package.files or ()}
    return found
