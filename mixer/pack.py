"""Packing one window of drawn documents into sequences of exactly the stage's context."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dataprep.storage import array_buffers
from kernels.best_fit import best_fit, copy_runs
from mixer.guarantees import count
from mixer.hashing import hashed
from mixer.shards import SEGMENT, StageInfo


@dataclass(frozen=True)
class Packed:
    """tokens: (n, context), padded with EOS. segments: SEGMENT, in row order. counts: of `guarantees.count`."""

    tokens: np.ndarray
    segments: np.ndarray
    counts: dict[str, Any]


def pack_window(drawn: pa.Table, info: StageInfo, long_documents: str, seed: int) -> Packed:
    """Pack a window's items (DRAWN of mixer/draw.py, in any order) by best-fit decreasing, in training order.

    long_documents: "split" into pieces of `context` tokens, "truncate" to the first, or "drop". Memory: the items' ids
    twice.
    """
    width = info.dtype.itemsize
    chunks = [array_buffers(chunk) for chunk in drawn["ids"].chunks]
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(offsets) // width for _, offsets in chunks)])
    item, segments = arrange(drawn, lengths, info, long_documents, seed)
    counts = count(drawn, lengths, item, segments, info, long_documents)

    tokens = np.full((counts["sequences"], info.context), info.eos, info.dtype)
    places = segments["sequence"] * info.context + segments["start"]
    begins = (segments["offset"] - drawn["offset"].to_numpy()[item]).astype(np.int64)  # in the item
    by_item = np.argsort(item)
    first = 0
    for data, offsets in chunks:
        last = first + len(offsets) - 1
        here = by_item[slice(*np.searchsorted(item[by_item], [first, last]))]
        ids = data[: len(data) // width * width].view(info.dtype)
        starts = offsets[item[here] - first] // width + begins[here]
        copy_runs(ids, starts, segments["length"][here], tokens.reshape(-1), places[here])
        first = last
    return Packed(tokens, segments, counts)


def arrange(
    drawn: pa.Table, lengths: np.ndarray, info: StageInfo, long_documents: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """(row in `drawn` of each segment, the segments in training order) for items of these lengths."""
    order = drawn["order"].to_numpy()
    by_order = np.argsort(order)
    if (order[by_order[1:]] == order[by_order[:-1]]).any():
        by_order = np.lexsort([drawn[name].to_numpy() for name in ("copy", "offset", "doc", "order")])
    nth, place, length = _pieces(lengths[by_order], info.context, long_documents)
    bin_ = best_fit(length, info.context)
    window = int(drawn["window"][0].as_py()) if len(drawn) else 0  # one and the same for all items
    row = deal(np.bincount(bin_, length.astype(np.float64) ** 2), seed, info.stage, window)[bin_]
    by_row = np.sort((row << 32) | np.arange(len(row))) & 0xFFFFFFFF
    item, row, place, length = by_order[nth[by_row]], row[by_row], place[by_row], length[by_row]

    segments = np.zeros(len(item), SEGMENT)
    segments["sequence"], segments["length"] = row, length
    before = np.cumsum(length) - length
    first = np.flatnonzero(np.diff(row, prepend=-1))  # each sequence's first segment
    segments["start"] = before - np.repeat(before[first], np.diff(first, append=len(row)))
    segments["offset"] = drawn["offset"].to_numpy()[item] + place.astype(np.uint64)
    for name in ("doc", "copy", "source", "tier", "length_class"):
        segments[name] = drawn[name].to_numpy()[item]
    return item, segments


def deal(costs: np.ndarray, seed: int, stage: str, window: int) -> np.ndarray:
    """The row in training order of each sequence of a window, so that slices of any batch cost about the same.

    Sequences are ranked by cost (sum of squared segment lengths: what their attention costs) and dealt by a van der
    Corput sequence with a hashed start: row p has the rank at p's bits reversed. Any run of rows then holds cheap and
    dear sequences in the window's proportions, 2^k rows from a multiple of 2^k on one of each 2^k-th of the ranks,
    however long batches are and whoever shares them.
    """
    sequences = np.arange(len(costs))
    ties = hashed(seed, f"sequences {stage}", np.full(len(costs), window), sequences)
    start = hashed(seed, f"deal {stage}", np.array([window]))[0] >> np.uint64(32)
    by_cost = np.lexsort((ties, costs))
    rank = np.empty(len(costs), np.int64)
    rank[np.argsort((_reversed_bits(sequences) + start) & np.uint64(0xFFFFFFFF))] = sequences
    row = np.empty(len(costs), np.int64)
    row[by_cost[rank]] = sequences
    return row


def _reversed_bits(numbers: np.ndarray) -> np.ndarray:
    """Whole numbers below 2^32 with their 32 bits reversed."""
    value = numbers.astype(np.uint64)
    for bits, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
        bits_, mask_ = np.uint64(bits), np.uint64(mask)
        value = ((value & mask_) << bits_) | ((value >> bits_) & mask_)
    return value


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
