"""The sums in a quality commit: what a report reads instead of documents."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.quality import encode, groups
from dataprep.rules import RULES, TIERS
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
    group, names = groups(documents, measured)
    codes, sources = encode(documents["source"])
    tier = table["tier"].combine_chunks().indices.to_numpy().astype(np.int64)
    size = pc.binary_length(documents["text"]).to_numpy()
    cell = group * len(TIERS) + tier
    count = np.bincount(cell, minlength=len(names) * len(TIERS))
    total = np.bincount(cell, size, len(count)).astype(np.int64)
    bins = np.minimum((table["score"].to_numpy() * BINS).astype(np.int64), BINS - 1)
    failed = table["failed"].combine_chunks()
    rules = np.asarray(pc.list_flatten(failed).indices, np.int64)
    rule_codes = codes[np.asarray(pc.list_parent_indices(failed), np.int64)]
    bad = table["contaminated"].to_numpy()
    evaluation = pc.fill_null(measured["evaluation"].cast(pa.string()), "").to_numpy(zero_copy_only=False)
    examples = _examples(table, documents, codes * len(TIERS) + tier)
    result: dict[str, Any] = {
        "cells": [
            {"source": s, "language": l, "tier": t, "documents": int(count[k]), "bytes": int(total[k])}
            for k, (s, l, t) in enumerate((s, l, t) for s, l in names for t in TIERS)
            if count[k]
        ]
    }
    for name in ("failed", "scores", "evaluation", "examples"):
        result[name] = {}
    for code, name in enumerate(sources):
        here = codes == code
        result["failed"][name] = _counts(rules[rule_codes == code], tuple(RULES))
        by_tier = np.bincount(tier[here] * BINS + bins[here], minlength=len(TIERS) * BINS).reshape(-1, BINS)
        result["scores"][name] = dict(zip(TIERS, by_tier.tolist(), strict=True))
        hit, hits = np.unique(evaluation[here & bad], return_counts=True)
        result["evaluation"][name] = dict(zip(hit.tolist(), hits.tolist(), strict=True))
        result["examples"][name] = {
            t: found for k, t in enumerate(TIERS) if (found := examples.get(code * len(TIERS) + k))
        }
    return result


def _examples(table: pa.Table, documents: pa.Table, group: np.ndarray) -> dict[int, list[dict[str, Any]]]:
    rank = mix(documents["doc"].to_numpy())
    order = np.lexsort((rank, group))
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    chosen = order[place < EXAMPLES]
    excerpts = pc.utf8_slice_codeunits(documents["text"].take(pa.array(chosen)), 0, 200)
    result: dict[int, list[dict[str, Any]]] = {}
    for row, excerpt in zip(chosen.tolist(), excerpts.to_pylist(), strict=True):
        points = round(table["score"][row].as_py(), 4)
        example = {"doc": documents["doc"][row].as_py(), "rank": int(rank[row]), "score": points, "excerpt": excerpt}
        result.setdefault(int(group[row]), []).append(example)
    return result


def _counts(codes: np.ndarray, names: tuple[str, ...]) -> dict[str, int]:
    return {name: count for name, count in zip(names, np.bincount(codes).tolist(), strict=False) if count}


def smallest(parts: Iterable[Examples]) -> Examples:
    """The `examples` of several partitions as those of one."""
    found: Examples = {}
    for part in parts:
        for source, by_tier in part.items():
            for tier, few in by_tier.items():
                mine = found.setdefault(source, {}).setdefault(tier, [])
                mine[:] = sorted([*mine, *few], key=lambda one: (one["rank"], one["doc"]))[:EXAMPLES]
    return found
