"""What packing promises: counted in every window, added up, held against the plan, and checked before a stage ends."""

from collections import Counter
from collections.abc import Iterable
from math import sqrt
from typing import Any

import numpy as np
import pyarrow as pa

from dataprep.storage import add_up
from mixer.plan import StagePlan
from mixer.shards import StageInfo

CELL = ("source", "tier", "length_class")
TOKENS = ("tokens_in", "packed", "truncated", "dropped")
COUNTS = ("items", "cut", "pieces", "cut_though_fitting", *TOKENS, "padding", "sequences", "segments")
FINE = np.int64(47)  # bits below a float64's exponent and its first five digits: costs are counted 32 to an octave


def count(
    drawn: pa.Table, lengths: np.ndarray, item: np.ndarray, segments: np.ndarray, info: StageInfo, long_documents: str
) -> dict[str, Any]:
    """A window's counts, as JSON. lengths: tokens of each item. item: its row in `drawn`, of each segment.

    tokens_in comes from the items and packed from the segments, each for itself: `broken` compares them. cut: items in
    several pieces, which `pieces` counts. cost: of each sequence, the sum of its squared segment lengths, as a
    histogram. order: sums for the correlation of a sequence's place with the mean length of its tokens' documents.
    """
    over = np.where(long_documents == "split", 0, np.maximum(0, lengths - info.context))
    dropped = np.where(lengths > info.context, lengths, 0) if long_documents == "drop" else np.zeros_like(lengths)
    source, sources = drawn["source"].to_numpy(), len(info.sources)
    tokens = {
        "tokens_in": np.bincount(source, lengths, sources),
        "packed": np.bincount(segments["source"], segments["length"], sources),
        "truncated": np.bincount(source, over if long_documents == "truncate" else 0 * lengths, sources),
        "dropped": np.bincount(source, dropped, sources),
    }
    pieces = np.bincount(item, minlength=len(lengths))
    sequences = int(segments["sequence"][-1]) + 1 if len(segments) else 0
    length = segments["length"].astype(np.float64)
    costs = np.bincount(segments["sequence"], length**2, sequences)
    mean = costs / np.bincount(segments["sequence"], length, sequences)
    copies = np.zeros(len(info.tiers), np.int64)
    np.maximum.at(copies, segments["tier"], segments["copy"].astype(np.int64) + 1)
    bins, numbers = np.unique(costs.view(np.int64) >> FINE, return_counts=True)
    return {
        "items": len(lengths),
        "cut": int((pieces > 1).sum()),
        "pieces": int(pieces[pieces > 1].sum()),
        "cut_though_fitting": int(((pieces > 1) & (lengths <= info.context)).sum()),
        **{name: int(value.sum()) for name, value in tokens.items()},
        "padding": sequences * info.context - int(segments["length"].sum()),
        "sequences": sequences,
        "segments": len(segments),
        "sources": {s: {name: int(v[i]) for name, v in tokens.items()} for i, s in enumerate(info.sources)},
        "copies": dict(zip(info.tiers, copies.tolist(), strict=True)),
        "cost": {"max": int(costs.max(initial=0)), "bins": dict(zip(map(str, bins), numbers.tolist(), strict=True))},
        "order": [float(mean.sum()), float((mean**2).sum()), float((mean * np.arange(sequences)).sum())],
        "cells": _by_cell(segments, info),
    }


def add_counts(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several windows, in training order, as one."""
    parts = list(parts)
    nothing: dict[str, Any] = dict.fromkeys(COUNTS, 0) | {"sources": {}, "cost": {"max": 0, "bins": {}}}
    total = add_up([nothing, *({name: part[name] for name in nothing} for part in parts)])
    total["cost"]["max"] = max((part["cost"]["max"] for part in parts), default=0)
    total["copies"] = {
        tier: max(part["copies"][tier] for part in parts) for part in parts[:1] for tier in part["copies"]
    }
    order, before = [0.0, 0.0, 0.0], 0
    cells: Counter[tuple[str, ...]] = Counter()
    for part in parts:
        sums, squares, products = part["order"]
        order = [order[0] + sums, order[1] + squares, order[2] + products + before * sums]
        before += part["sequences"]
        cells.update({tuple(row[name] for name in CELL): row["tokens"] for row in part["cells"]})
    rows = [dict(zip(CELL, key, strict=True)) | {"tokens": cells[key]} for key in sorted(cells)]
    return total | {"order": order, "cells": rows}


def summary(counts: dict[str, Any], stage: StagePlan, caps: dict[str, int]) -> dict[str, Any]:
    """A stage's totals for end.json: the counts, what follows from them, and shares beside the planned ones.

    caps: by tier. shares: by class, source and tier the parts of all tokens (planned, packed).
    """
    sequences, cost = counts["sequences"], counts["cost"]
    totals = {name: value for name, value in counts.items() if name not in ("cost", "order", "copies")}
    shares = {}
    for by in CELL:
        planned = stage.by(by)
        packed = add_up({row[by]: row["tokens"]} for row in counts["cells"])
        whole = max(1, sum(planned.values())), max(1, sum(packed.values()))
        names = sorted({*planned, *packed})
        shares[by] = {name: [planned.get(name, 0) / whole[0], packed.get(name, 0) / whole[1]] for name in names}
    return totals | {
        "padding_share": counts["padding"] / max(1, counts["padding"] + counts["packed"]),
        "segments_per_sequence": counts["segments"] / max(1, sequences),
        "sum_of_squares": {
            "p50": min(_quantile(cost["bins"], 0.5), cost["max"]),
            "p99": min(_quantile(cost["bins"], 0.99), cost["max"]),
            "max": cost["max"],
        },
        "order_length_correlation": _correlation(sequences, *counts["order"]),
        "most_copies": {tier: [copies, caps.get(tier, 1)] for tier, copies in counts["copies"].items()},
        "shares": shares,
    }


def broken(totals: dict[str, Any], context: int) -> list[str]:
    """The guarantees that these totals (of `summary`) do not keep, a line each."""
    wrong = [
        f"source {source}: {t['tokens_in']} tokens in, but {t['packed']} packed + {t['truncated']} truncated + "
        f"{t['dropped']} dropped"
        for source, t in totals["sources"].items()
        if t["tokens_in"] != t["packed"] + t["truncated"] + t["dropped"]
    ]
    if totals["sequences"] * context != totals["packed"] + totals["padding"]:
        wrong.append(
            f"{totals['sequences']} sequences of {context} are not {totals['packed']} + {totals['padding']} padding"
        )
    if totals["cut_though_fitting"]:
        wrong.append(f"{totals['cut_though_fitting']} documents that fit are cut")
    wrong += [
        f"a document of tier {tier} has {copies} copies, over its cap of {cap}"
        for tier, (copies, cap) in totals["most_copies"].items()
        if copies > cap
    ]
    return wrong


def _quantile(bins: dict[str, int], part: float) -> int:
    """The middle of the bin (within 2 %) that holds this quantile."""
    if not bins:
        return 0
    values = np.sort(np.array([int(b) for b in bins], np.int64))
    below = np.cumsum([bins[str(v)] for v in values])
    found = values[np.searchsorted(below, part * below[-1])]
    return int(((found << FINE) | (1 << 46)).view(np.float64))


def _correlation(n: int, sums: float, squares: float, products: float) -> float:
    """Of the places 0..n-1 with values of these sums (and products with their places)."""
    spread = n * squares - sums**2
    if spread <= 1e-9 * n * squares:
        return 0.0  # all alike
    return (n * products - n * (n - 1) / 2 * sums) / sqrt(spread * n**2 * (n**2 - 1) / 12)


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
