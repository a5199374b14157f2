"""What every kernel that reads text promises: a document is measured alone, whatever it holds and stands beside."""

import numpy as np
import pytest

from kernels import gopher, lines
from kernels.words import word_hashes

KERNELS = {
    "gopher": gopher.signals,
    "lines": lines.signals,
    "candidate words": lambda data, offsets: word_hashes(data, offsets, "candidate"),
    "verified words": lambda data, offsets: word_hashes(data, offsets, "verification"),
}
BROKEN = [b"\xff\xfe a.", b"ab \xe6\xbc", b"\xf0\x9f\x99", b"\xc3", b"a\x80\x80 b", b"lorem ipsu", b"javascrip"]
HOSTILE = {
    "empty": "", "nul": "\0" * 1000, "nul between": "a\0b\0" * 500, "one line": "x" * 1_000_000, "han": "漢" * 200_000,
    "one word": "spam " * 200_000, "marks": "a" + "\u0301" * 10_000, "right to left": "שלום עולם\u202e" * 50,
    "lines": "a\n" * 300_000, "ends": "\n" * 500_000, "stops": "." * 1_000_000, "policy": "lorem ipsum" * 50_000,
}  # fmt: skip


def measure(kernel, data: bytes, start: int, stop: int) -> list[list[float]]:
    found = KERNELS[kernel](np.frombuffer(data, np.uint8), np.array([start, stop]))
    return [part.tolist() for part in found]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("after", [b"\xbf\xbf\xbf", "字 more".encode(), b"m", b"t more"])
@pytest.mark.parametrize("document", BROKEN)
def test_nothing_is_read_past_a_document_that_breaks_off(kernel, document, after):
    whole = measure(kernel, b"before it " + document + after, 10, 10 + len(document))
    assert whole == measure(kernel, document, 0, len(document))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_documents_take_linear_time_and_change_nothing_for_their_neighbours(kernel, text):
    parts = [b"first words\n\n", text.encode(), "the 漢字. last\nwords of it".encode()]
    offsets = np.cumsum([0, *map(len, parts)])
    together = KERNELS[kernel](np.frombuffer(b"".join(parts), np.uint8), offsets)
    if isinstance(together, tuple):  # words and where each document's begin
        together = np.split(together[0], together[1][1:-1])
    for found, part in zip(together, parts, strict=True):
        np.testing.assert_array_equal(found, measure(kernel, part, 0, len(part))[0])
