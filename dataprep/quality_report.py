"""What a person sees of quality: the sums in a commit, and a sheet of examples to read before trusting them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.quality import counts, groups
from dataprep.rules import TIERS
from kernels.words import mix

SHEET = Path(__file__).with_name("sheet.html")
BINS = 20
EXAMPLES = 3
Examples = dict[str, dict[str, list[dict[str, Any]]]]  # source -> tier -> a few documents
SHOWN = 1500  # characters of an example's text in the sheet


def aggregates(table: pa.Table, documents: pa.Table, measured: pa.Table) -> dict[str, Any]:
    """What a report reads instead of documents. table: from `judge`, measured: from `measure`.

    `cells`: [{source, language, tier, documents, bytes}]. `failed`: source -> rule -> documents. `scores`: source ->
    tier -> counts in BINS equal bins. `evaluation`: source -> evaluation set -> contaminated documents. `examples`:
    source -> tier -> up to EXAMPLES of {doc, rank, score, excerpt}, those with the smallest hash of doc (`rank`), so
    that several partitions' examples can be merged.
    """
    source, tier = documents["source"].cast(pa.string()), table["tier"].cast(pa.string())
    sources: list[str] = source.unique().to_pylist()
    none: dict[str, Any] = {name: {} for name in sources}
    bins = np.minimum((table["score"].to_numpy() * BINS).astype(np.int64), BINS - 1)
    scores = counts(source, tier, pa.array(bins))
    failed, bad = table["failed"].combine_chunks(), table["contaminated"]
    return {
        "cells": _cells(source, table["language"].cast(pa.string()), tier, pc.binary_length(documents["text"])),
        "failed": none | counts(source.take(pc.list_parent_indices(failed)), pc.list_flatten(failed)),
        "scores": {s: {t: [scores[s].get(t, {}).get(str(b), 0) for b in range(BINS)] for t in TIERS} for s in sources},
        "evaluation": none | counts(source.filter(bad), measured["evaluation"].filter(bad)),
        "examples": _examples(table, documents),
    }


def _cells(*columns: pa.ChunkedArray) -> list[dict[str, Any]]:
    keys = ["source", "language", "tier"]
    sums = pa.table(columns, [*keys, "bytes"]).group_by(keys).aggregate([("bytes", "count"), ("bytes", "sum")])
    rows = sorted(sums.to_pylist(), key=lambda row: (row["source"], row["language"], TIERS.index(row["tier"])))
    return [{k: row[k] for k in keys} | {"documents": row["bytes_count"], "bytes": row["bytes_sum"]} for row in rows]


def _examples(table: pa.Table, documents: pa.Table) -> Examples:
    rank = mix(documents["doc"].to_numpy())
    group, names = groups(documents["source"], table["tier"])
    order = np.lexsort((rank, group))
    place = np.arange(len(order)) - np.searchsorted(group[order], group[order])
    chosen = order[place < EXAMPLES]
    excerpts = pc.utf8_slice_codeunits(documents["text"].take(pa.array(chosen)), 0, 200)
    result: Examples = {}
    for row, excerpt in zip(chosen.tolist(), excerpts.to_pylist(), strict=True):
        points = round(table["score"][row].as_py(), 4)
        example = {"doc": documents["doc"][row].as_py(), "rank": int(rank[row]), "score": points, "excerpt": excerpt}
        source, tier = names[group[row]]
        result.setdefault(source, {}).setdefault(tier, []).append(example)
    return result


def smallest(parts: Iterable[Examples]) -> Examples:
    """The `examples` of several partitions as those of one."""
    found: Examples = {}
    for part in parts:
        for source, by_tier in part.items():
            for tier, few in by_tier.items():
                mine = found.setdefault(source, {}).setdefault(tier, [])
                mine[:] = sorted([*mine, *few], key=lambda one: (one["rank"], one["doc"]))[:EXAMPLES]
    return found


def sheet(examples: list[dict[str, Any]]) -> str:
    """A page of examples, in the order given: rows of the documents, `signals` and `quality` tables, joined.

    Each has doc, source, id, text, tier, score, failed and the signals. Everything is escaped.
    """
    page = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page.filters["visible"] = _visible
    return page.from_string(SHEET.read_text()).render(examples=examples, shown=SHOWN)


def _visible(text: str) -> str:
    """The text with what could move or hide other text (controls, bidi) spelt out."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
