"""Megatron-LM files, read back by a reader written from the format's description alone."""

import os
import struct

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataprep import megatron
from dataprep.storage import UserError, binary_array

NUMPY_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}


def read(bin_path: str, idx_path: str) -> tuple[str, list[list[int]], list[int]]:
    """(numpy type, sequences, document indices)."""
    with open(idx_path, "rb") as file:
        index = file.read()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, documents = struct.unpack_from("<QBQQ", index, 9)
    assert version == 1
    at = 34
    lengths = np.frombuffer(index, "<i4", sequences, at)
    at += 4 * sequences
    pointers = np.frombuffer(index, "<i8", sequences, at)
    at += 8 * sequences
    boundaries = np.frombuffer(index, "<i8", documents, at)
    assert at + 8 * documents == len(index)
    with open(bin_path, "rb") as file:
        data = file.read()
    kind = NUMPY_TYPES[code]
    found = [np.frombuffer(data, kind, n, p).tolist() for n, p in zip(lengths, pointers, strict=True)]
    assert len(data) == sum(map(len, found)) * np.dtype(kind).itemsize
    return kind, found, boundaries.tolist()


def table(documents: list[list[int]], dtype: str) -> pa.Table:
    ids = pa.array([np.array(d, dtype).tobytes() for d in documents], pa.large_binary())
    return pa.table({"doc": pa.array(range(len(documents)), pa.uint64()), "ids": ids})


@pytest.mark.parametrize(("dtype", "kind", "top"), [("uint16", "<u2", 2**16 - 1), ("uint32", "<i4", 200_000)])
def test_documents_come_back(tmp_path_factory, dtype: str, kind: str, top: int) -> None:
    path = str(tmp_path_factory.mktemp("megatron"))
    names = os.path.join(path, "a.bin"), os.path.join(path, "a.idx")
    document = st.lists(st.integers(0, top), min_size=1, max_size=20)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.lists(document, max_size=5), max_size=4))
    def check(parts: list[list[list[int]]]) -> None:
        documents = [d for part in parts for d in part]
        assert megatron.write(*names, [table(part, dtype) for part in parts], dtype) == len(documents)
        assert read(*names) == (kind, documents, list(range(len(documents) + 1)))

    check()


def test_slices_filters_and_chunks(tmp_path) -> None:
    names = str(tmp_path / "a.bin"), str(tmp_path / "a.idx")
    whole = table([[k] * (k + 1) for k in range(10)], "uint16")
    parts = [whole.slice(2, 3), pa.concat_tables([whole.slice(7, 2), whole.slice(0, 1)])]
    parts.append(whole.filter(pa.array([k % 4 == 1 for k in range(10)])))
    megatron.write(*names, iter(parts), "uint16")
    assert read(*names)[1] == [[k] * (k + 1) for k in (2, 3, 4, 7, 8, 0, 1, 5, 9)]


def test_a_document_beyond_int32_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(megatron, "LONGEST", 4)
    ids = binary_array(np.zeros(18, np.uint8), np.array([0, 8, 18]))
    tokens = pa.table({"doc": pa.array([5, 6], pa.uint64()), "ids": ids})
    with pytest.raises(UserError, match="document 6 has 5 tokens"):
        megatron.write(str(tmp_path / "a.bin"), str(tmp_path / "a.idx"), [tokens], "uint16")
