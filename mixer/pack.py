"""Packing one window of drawn documents into sequences of exactly the stage's context."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dataprep.storage import array_buffers
from kernels.best_fit import best_fit, copy_runs
from mixer.hashing import hashed
from mixer.shards import SEGMENT, StageInfo

CELL = ("source", "tier", "length_class")
COUNTS = (
    "items", "items_over_context", "tokens_in", "packed", "truncated", "dropped", "padding", "sequences", "segments",
)  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """tokens: (n, context), padded with EOS. segments: SEGMENT, in row order. counts: JSON, `sequences` among them."""

    tokens: np.ndarray
    segments: np.ndarray
    counts: dict[str, Any]


def pack_window(drawn: pa.Table, info: StageInfo, long_documents: str, seed: int) -> Packed:
    """Pack a window's items (DRAWN of mixer/draw.py, in any order) by best-fit decreasing; bins in a hashed order.

    long_documents: "split" into pieces of `context` tokens, "truncate" to the first, or "drop". In the counts,
    tokens_in = packed + truncated + dropped, and sequences x context = packed + padding.
    """
    data, offsets = array_buffers(drawn["ids"])
    item = np.lexsort([drawn[name].to_numpy() for name in ("copy", "offset", "doc", "order")])
    width = info.dtype.itemsize
    begins, lengths = offsets[:-1][item] // width, np.diff(offsets)[item] // width
    pieces, place, length = _pieces(lengths, info.context, long_documents)

    bin_ = best_fit(length, info.context)
    sequences = int(bin_.max()) + 1 if len(bin_) else 0
    window = np.repeat(drawn["window"].to_numpy()[:1], sequences)  # one and the same for all items
    keys = hashed(seed, f"sequences {info.stage}", window, np.arange(sequences))
    rank = np.empty(sequences, np.int64)
    rank[np.argsort(keys, kind="stable")] = np.arange(sequences)
    by_row = np.argsort(rank[bin_], kind="stable")
    pieces, place, length = pieces[by_row], place[by_row], length[by_row]

    segments = np.zeros(len(pieces), SEGMENT)
    segments["sequence"] = rank[bin_][by_row]
    segments["length"], segments["offset"] = length, drawn["offset"].to_numpy()[item[pieces]] + place
    before = np.cumsum(length) - length
    segments["start"] = before - before[np.searchsorted(segments["sequence"], segments["sequence"])]
    for name in ("doc", "copy", "source", "tier", "length_class"):
        segments[name] = drawn[name].to_numpy()[item[pieces]]

    tokens = np.full((sequences, info.context), info.eos, info.dtype)
    ids = data[: len(data) // width * width].view(info.dtype)
    row_starts = segments["sequence"] * info.context + segments["start"]
    copy_runs(ids, begins[pieces] + place, length, tokens.reshape(-1), row_starts)
    return Packed(tokens, segments, _counts(lengths, segments, sequences, info, long_documents))


def add_counts(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several windows as one."""
    total: dict[str, Any] = dict.fromkeys(COUNTS, 0)
    cells: dict[tuple[str, ...], int] = {}
    for part in parts:
        for name, value in part.items():
            if name != "cells":
                total[name] = total.get(name, 0) + value
        for row in part["cells"]:
            key = tuple(row[name] for name in CELL)
            cells[key] = cells.get(key, 0) + row["tokens"]
    return total | {"cells": [dict(zip(CELL, key, strict=True)) | {"tokens": cells[key]} for key in sorted(cells)]}


def _pieces(lengths: np.ndarray, context: int, long_documents: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(item, first token in the item, length) of each piece to pack."""
    if long_documents == "split":
        number = -(-lengths // context)
    elif long_documents == "truncate":
        number = np.minimum(lengths, 1)
    else:
        number = ((lengths > 0) & (lengths <= context)).astype(np.int64)
    items = np.repeat(np.arange(len(lengths)), number)
    nth = np.arange(len(items)) - np.repeat(np.cumsum(number) - number, number)
    return items, nth * context, np.minimum(lengths[items] - nth * context, context)


def _counts(
    lengths: np.ndarray, segments: np.ndarray, sequences: int, info: StageInfo, long_documents: str
) -> dict[str, Any]:
    over = lengths > info.context
    packed = int(segments["length"].sum())
    lost = int(lengths.sum()) - packed
    return {
        "items": len(lengths),
        "items_over_context": int(over.sum()),
        "tokens_in": int(lengths.sum()),
        "packed": packed,
        "truncated": lost if long_documents == "truncate" else 0,
        "dropped": lost if long_documents == "drop" else 0,
        "padding": sequences * info.context - packed,
        "sequences": sequences,
        "segments": len(segments),
        "cells": _by_cell(segments, info),
    }


def _by_cell(segments: np.ndarray, info: StageInfo) -> list[dict[str, Any]]:
    """Packed tokens by source, tier and length class, to hold against the plan."""
    shape = (len(info.sources), len(info.tiers), len(info.classes))
    cell = np.ravel_multi_index((segments["source"], segments["tier"], segments["length_class"]), shape)
    tokens = np.bincount(cell, segments["length"], int(np.prod(shape))).astype(np.int64)
    rows = []
    for number in np.nonzero(tokens)[0]:
        codes = np.unravel_index(number, shape)
        names = (info.sources[codes[0]], info.tiers[codes[1]], info.classes[codes[2]])
        rows.append(dict(zip(CELL, names, strict=True)) | {"tokens": int(tokens[number])})
    return rows
