"""Megatron-LM's indexed data set (`.bin` and `.idx`), written from token tables as they come.

The `.bin` file holds the ids of all sequences, one after the other. The `.idx` file describes them, little-endian and
without padding:

    9 bytes    "MMIDIDX", two zero bytes
    uint64     version, 1
    uint8      type of an id: 8 = uint16, 4 = int32
    uint64     number of sequences S
    uint64     number of document boundaries, D + 1
    int32[S]   ids in each sequence
    int64[S]   byte in the `.bin` file where each begins
    int64[D+1] sequence with which each document begins, and S

Here every document is one sequence.
"""

import struct
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from dataprep.storage import UserError, array_buffers

MAGIC = b"MMIDIDX\x00\x00"
# Type of our ids -> (code, type of theirs). The format knows no uint32.
TYPES: dict[str, tuple[int, np.dtype]] = {"uint16": (8, np.dtype("<u2")), "uint32": (4, np.dtype("<i4"))}
LONGEST = 2**31 - 1


def write(bin_path: str, idx_path: str, tables: Iterable[pa.Table], dtype: str) -> int:
    """Write the local files `bin_path` and `idx_path`; returns the number of documents.

    tables: with the columns doc and ids (large_binary of `dtype`, "uint16" or "uint32"), one document a row. Keeps four
    bytes a document in memory. UserError for a document of 2^31 tokens or more.
    """
    code, stored = TYPES[dtype]
    lengths = [np.zeros(0, np.int32)]
    with open(bin_path, "wb") as file:
        for table in tables:
            for batch in table.to_batches():
                data, offsets = array_buffers(batch["ids"])
                counts = np.diff(offsets) // stored.itemsize
                for row in np.nonzero(counts > LONGEST)[0][:1].tolist():
                    doc, count = batch["doc"][row].as_py(), counts[row]
                    raise UserError(f"document {doc} has {count:,} tokens; Megatron-LM takes at most {LONGEST:,}")
                file.write(data[offsets[0] : offsets[-1]].data)
                lengths.append(counts.astype(np.int32))
    sequences = np.concatenate(lengths)
    pointers = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum(sequences, dtype=np.int64, out=pointers[1:])
    with open(idx_path, "wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, code, len(sequences), len(sequences) + 1))
        file.write(sequences.astype("<i4").data)
        file.write((pointers[:-1] * stored.itemsize).astype("<i8").data)
        file.write(np.arange(len(sequences) + 1, dtype="<i8").data)
    return len(sequences)
