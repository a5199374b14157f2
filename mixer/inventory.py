"""What one corpus partition offers: a table of the documents to draw from, and its sums for the planner."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.storage import UserError, add_up
from mixer.config import CLASSES, HELD_OUT, TIERS, MixConfig
from mixer.exclude import excludes
from mixer.hashing import hashed

BUCKETS = 1024
EXACT = 4096  # a cell of at most so many items lists them all
WITHIN = 32 - 10  # bits of the draw hash below the bucket's number


def draw_hash(seed: int, doc: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """An item's place in its cell (int64 below 2^32): the highest ten bits are its bucket."""
    return (hashed(seed, "draw", doc, offset) >> np.uint64(32)).astype(np.int64)


def parts(n_tokens: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is drawn of documents: (document's row, first token, tokens) of each item.

    A document over the longest context of all stages will be split anyway: its parts of that length are items with
    places of their own, so that one huge document does not part drawn tokens from planned ones.
    """
    number = np.maximum(1, -(-n_tokens // longest))
    row = np.repeat(np.arange(len(number)), number)
    offset = (np.arange(len(row)) - np.repeat(np.cumsum(number) - number, number)) * longest
    return row, offset, np.minimum(n_tokens[row] - offset, longest)


def longest_context(config: MixConfig) -> int:
    """Tokens in the longest sequence of all stages, the held-out split among them."""
    return max([*(stage.context for stage in config.stages), config.held_out.context or 0])


def take_inventory(
    documents: pa.Table, dedup: pa.Table, quality: pa.Table, tokens: pa.Table, config: MixConfig, exclude: pa.Table
) -> tuple[pa.Table, dict[str, Any]]:
    """Join a partition's tables into the documents to draw from and sums that `add_inventories` adds up.

    documents: doc, source, id, content_hash. dedup: doc, keep, cluster. quality: doc, tier and, where it shall take
    effect, contaminated. tokens: doc, n_tokens. exclude: of `load_exclude`.
    The table: doc uint64, row uint32 (in the partition), n_tokens uint32, source dictionary, tier and length_class
    uint8 (indices into TIERS and CLASSES), held_out bool. Raises UserError where the tables do not fit together.
    """
    doc = documents["doc"].to_numpy()
    for name, table in (("dedup", dedup), ("quality", quality), ("tokens", tokens)):
        if not np.array_equal(table["doc"].to_numpy(), doc):
            raise UserError(f"the {name} table has other documents than the corpus partition; run {name} again")
    tier = pc.index_in(quality["tier"].cast(pa.string()), pa.array(TIERS))
    if tier.null_count:
        odd = pc.unique(quality["tier"].filter(pc.is_null(tier))).to_pylist()
        raise UserError(f"the quality table has the tier {odd[0]!r}; the tiers are {', '.join(TIERS)}")
    n_tokens = tokens["n_tokens"].to_numpy()
    kept = dedup["keep"].to_numpy()
    excluded, lines_used = excludes(exclude, documents)
    contaminated = np.zeros(len(doc), bool)
    if "contaminated" in quality.column_names:
        contaminated = quality["contaminated"].to_numpy() & kept & ~excluded
    bounds = [config.thresholds.medium, config.thresholds.long]
    cluster = dedup["cluster"].to_numpy()
    held_out = hashed(config.seed, HELD_OUT, cluster) < np.uint64(int(config.held_out.fraction * 2.0**64))
    table = pa.table(
        {
            "doc": documents["doc"],
            "row": pa.array(np.arange(len(doc), dtype=np.uint32)),
            "n_tokens": tokens["n_tokens"],
            "source": documents["source"],
            "tier": tier.cast(pa.uint8()),
            "length_class": pa.array(np.searchsorted(bounds, n_tokens, side="right").astype(np.uint8)),
            "held_out": pa.array(held_out),
        }
    ).filter(pa.array(kept & ~excluded & ~contaminated))
    sums = {
        "exclude_lines": lines_used,
        "cells": _cells(table, config),
        "removed": {
            "duplicate": _count(n_tokens, ~kept),
            "excluded": _count(n_tokens, kept & excluded),
            "contaminated": _count(n_tokens, contaminated),
            # The exclude file names a duplicate whose keeper it does not name: worth a look.
            "excluded_duplicate": _count(n_tokens, ~kept & excluded),
        },
    }
    return table, sums


def usable(n_tokens: np.ndarray, context: int, long_documents: str) -> np.ndarray:
    """Tokens of each document that a stage packs under its policy for documents longer than the context."""
    if long_documents == "truncate":
        return np.minimum(n_tokens, context)
    return np.where(n_tokens <= context, n_tokens, 0) if long_documents == "drop" else n_tokens


def _cells(table: pa.Table, config: MixConfig) -> list[dict[str, Any]]:
    """Sums by source, tier and length class; held-out documents make cells of their own."""
    source = table["source"].combine_chunks().dictionary_encode()
    source = source.combine_chunks() if isinstance(source, pa.ChunkedArray) else source
    doc, n_tokens = table["doc"].to_numpy(), table["n_tokens"].to_numpy().astype(np.int64)
    codes = (source.indices.to_numpy(), table["tier"].to_numpy(), table["length_class"].to_numpy())
    cell = (codes[0].astype(np.int64) * len(TIERS) + codes[1]) * len(CLASSES) + codes[2]
    cell = cell * 2 + table["held_out"].to_numpy()
    row, offset, length = parts(n_tokens, longest_context(config))
    place = draw_hash(config.seed, doc[row], offset)
    packed = [  # of each item, where the policy for long documents takes something away
        None if s.long_documents == "split" else np.where(offset, 0, usable(n_tokens, s.context, s.long_documents)[row])
        for s in config.stages
    ]
    columns = np.array([place, length, *(column for column in packed if column is not None)])
    rows = []
    for number in np.unique(cell):
        (here,) = np.nonzero(cell == number)
        first, lengths = here[0], n_tokens[here]
        sums = {
            "source": source.dictionary[int(codes[0][first])].as_py(),
            "tier": TIERS[codes[1][first]],
            "length_class": CLASSES[codes[2][first]],
            "held_out": bool(number % 2),
            "documents": len(here),
            "tokens": int(lengths.sum()),
            "usable": [int(usable(lengths, s.context, s.long_documents).sum()) for s in config.stages],
        }
        rows.append(_json(sums | _line(columns[:, cell[row] == number])))
    return rows


def _line(items: np.ndarray, exact: bool = True) -> dict[str, Any]:
    """A cell's pieces by place: one for each item, or, if there are more than EXACT, for each of the hash's buckets.

    items, pieces: columns of places, tokens, then usable tokens for each stage that does not split.
    """
    exact = exact and items.shape[1] <= EXACT
    if exact:
        places, piece = np.unique(items[0], return_inverse=True)
    else:
        places, piece = np.arange(BUCKETS) << WITHIN, items[0] >> WITHIN
    sums = [np.bincount(piece, column, len(places)) for column in items[1:]]
    return {"exact": exact, "pieces": np.array([places, *sums]).astype(np.int64)}


def _json(cell: dict[str, Any]) -> dict[str, Any]:
    return cell | {"pieces": cell["pieces"].tolist()}


def _count(n_tokens: np.ndarray, rows: np.ndarray) -> dict[str, int]:
    return {"documents": int(rows.sum()), "tokens": int(n_tokens[rows].sum(dtype=np.int64))}


def add_inventories(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sums of several partitions as one, whatever their order; cells sorted."""
    removed = []
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for part in parts:
        removed.append(part["removed"])
        for row in part["cells"]:
            key = (row["source"], row["tier"], row["length_class"], row["held_out"])
            if (cell := cells.get(key)) is None:
                cells[key] = row | {"pieces": np.array(row["pieces"])}
                continue
            usable = [a + b for a, b in zip(cell["usable"], row["usable"], strict=True)]
            sums = {name: cell[name] + row[name] for name in ("documents", "tokens")} | {"usable": usable}
            pieces = np.concatenate([cell["pieces"], row["pieces"]], axis=1)
            cells[key] = cell | sums | _line(pieces, cell["exact"] and row["exact"])
    return {"removed": add_up(removed), "cells": [_json(cells[key]) for key in sorted(cells)]}
