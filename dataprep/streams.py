"""Bytes out of plain and compressed files, in blocks and in lines, within bounded memory."""

import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import zstandard

PLAIN_BLOCK = 1 << 20
COMPRESSED_BLOCK = 1 << 11  # small: a decoder may answer one block with thousands of times its size

_ZSTD = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # as far as `zstd --long=31` goes


class Unreadable(Exception):
    """A file's own bytes end too early or make no sense from here on; what was read before is good."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def blocks(file: BinaryIO, path: str) -> Iterator[bytes]:
    """The file's content, decompressed if `path` ends in .gz or .zst, members and frames one after another.

    Unreadable where the archive is cut short or corrupt, after everything before that.
    """
    if not path.endswith((".gz", ".zst")):
        while block := file.read(PLAIN_BLOCK):
            yield block
        return
    decoder: Any = None
    while block := file.read(COMPRESSED_BLOCK):
        while block:
            if decoder is None:
                block = block.lstrip(b"\0")  # padding between members
                if not block:
                    break
                decoder = zlib.decompressobj(31) if path.endswith(".gz") else _ZSTD.decompressobj()
            try:
                data = decoder.decompress(block)
            except (zlib.error, zstandard.ZstdError) as error:
                raise Unreadable("unreadable file", f"the archive is corrupt: {error}") from error
            if data:
                yield data
            block = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder = None
    if decoder is not None:
        raise Unreadable("truncated archive", "the archive ends in the middle of its data")


def lines(content: Iterable[bytes], limit: int) -> Iterator[tuple[bytes, int]]:
    """(line without its newline, length in bytes) for every line; of one over `limit` bytes only its beginning."""
    pieces: list[bytes] = []
    size = 0
    for block in content:
        first, *rest = block.split(b"\n")
        for index, piece in enumerate((first, *rest)):
            if index:
                yield b"".join(pieces), size
                pieces, size = [], 0
            size += len(piece)
            if size <= limit:
                pieces.append(piece)
            else:
                pieces = [b"".join(pieces)[:1024] or piece[:1024]]
    if size:
        yield b"".join(pieces), size
