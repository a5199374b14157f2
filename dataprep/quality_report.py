"""The sums in a quality commit: what a report reads instead of documents."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.quality import encode
from dataprep.rules import TIERS
from kernels.words import mix

BINS = 20
EXAMPLES = 3
Examples = dict[str, dict[str, list[dict[str, Any]]]]  # source -> tier -> a few documents


def aggregates(table: pa.Table, documents: pa.Table, measured: pa.Table) -> dict[str, Any]:
    """What a report reads instead of documents. table: from `judge`, measured: from `measure`.

    `cells`: [{source, language, tier, documents, bytes}]. `failed`: source -> rule -> documents. `scores`: source ->
    tier -> counts in BINS equal bins. `evaluation`: source -> evaluation set -> contaminated documents. `examples`:
    source -> tier -> up to EXAMPLES of {doc, rank, score, excerpt}, those with the smallest hash of doc (`rank`), so
    that several partitions' examples can be merged.
    """
    codes, sources = encode(documents["source"])
    source, tier = documents["source"].cast(pa.string()), table["tier"].combine_chunks()
    tiers, languages = tier.indices.to_numpy().astype(np.int64), measured["language"].cast(pa.string())
    columns = {"source": source, "language": languages, "order": tiers, "tier": tier.cast(pa.string())}
    cells = pa.table(columns | {"bytes": pc.binary_length(documents["text"])}).group_by(list(columns))
    sums = cells.aggregate([("bytes", "count"), ("bytes", "sum")]).rename_columns([*columns, "documents", "bytes"])
    sums = sums.sort_by([("source", "ascending"), ("language", "ascending"), ("order", "ascending")])
    failed, bad = table["failed"].combine_chunks(), table["contaminated"]
    bins = np.minimum((table["score"].to_numpy() * BINS).astype(np.int64), BINS - 1)
    place = (codes * len(TIERS) + tiers) * BINS + bins
    scores = np.bincount(place, minlength=len(sources) * len(TIERS) * BINS).reshape(-1, len(TIERS), BINS)
    return {
        "cells": sums.drop_columns(["order"]).to_pylist(),
        "failed": _counts(sources, source.take(pc.list_parent_indices(failed)), pc.list_flatten(failed)),
        "scores": {s: dict(zip(TIERS, rows.tolist(), strict=True)) for s, rows in zip(sources, scores, strict=True)},
        "evaluation": _counts(sources, source.filter(bad), measured["evaluation"].filter(bad)),
        "examples": _examples(sources, codes, tiers, table, documents),
    }


def _counts(sources: list[str], source: pa.ChunkedArray, values: pa.ChunkedArray) -> dict[str, dict[str, int]]:
    """source -> value -> how often."""
    found: dict[str, dict[str, int]] = {name: {} for name in sources}
    rows = pa.table([source, values.cast(pa.string())], ["source", "value"]).group_by(["source", "value"])
    for row in rows.aggregate([([], "count_all")]).to_pylist():
        found[row["source"]][row["value"] or ""] = row["count_all"]
    return found


def _examples(
    sources: list[str], codes: np.ndarray, tiers: np.ndarray, table: pa.Table, documents: pa.Table
) -> Examples:
    rank = mix(documents["doc"].to_numpy())
    group = codes * len(TIERS) + tiers
    order = np.lexsort((rank, group))
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    chosen = order[place < EXAMPLES]
    excerpts = pc.utf8_slice_codeunits(documents["text"].take(pa.array(chosen)), 0, 200)
    found: Examples = {name: {} for name in sources}
    for row, excerpt in zip(chosen.tolist(), excerpts.to_pylist(), strict=True):
        points = round(table["score"][row].as_py(), 4)
        example = {"doc": documents["doc"][row].as_py(), "rank": int(rank[row]), "score": points, "excerpt": excerpt}
        found[sources[codes[row]]].setdefault(TIERS[tiers[row]], []).append(example)
    return found


def smallest(parts: Iterable[Examples]) -> Examples:
    """The `examples` of several partitions as those of one."""
    found: Examples = {}
    for part in parts:
        for source, by_tier in part.items():
            for tier, few in by_tier.items():
                mine = found.setdefault(source, {}).setdefault(tier, [])
                mine[:] = sorted([*mine, *few], key=lambda one: (one["rank"], one["doc"]))[:EXAMPLES]
    return found
