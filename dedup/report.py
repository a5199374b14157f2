"""The verdicts of one corpus partition, sums by source and reason, and the alarm for a source that loses too much."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ATTRIBUTES = pa.schema(
    {
        "doc": pa.uint64(),
        "keep": pa.bool_(),
        "reason": pa.dictionary(pa.int32(), pa.string()),
        "keeper": pa.uint64(),
        "jaccard": pa.float32(),
        "cluster": pa.uint64(),
    }
)
REASONS = ("kept", "exact", "near")
Aggregates = dict[str, dict[str, dict[str, int]]]  # source -> "kept" and the reasons -> "documents", "bytes"


def attributes(docs: np.ndarray, removed: pa.Table) -> pa.Table:
    """Contract 2's `dedup` table for `docs` (uint64), in their order; removed: as from `keepers.choose`, of any docs.

    reason, keeper and jaccard are null where a document is kept; its cluster is then its own.
    """
    doc = pa.array(docs, pa.uint64())
    verdict = removed.take(pc.index_in(doc, value_set=removed["doc"]))
    columns = [
        doc,
        pc.is_null(verdict["keeper"]),
        verdict["reason"],
        verdict["keeper"],
        verdict["jaccard"],
        pc.coalesce(verdict["cluster"], doc),
    ]
    return pa.table(columns, schema=ATTRIBUTES)


def aggregates(documents: pa.Table, verdicts: pa.Table) -> Aggregates:
    """Documents and bytes of text by source and reason; documents: source and length, in the rows of `attributes`."""
    table = pa.table(
        {
            "source": documents["source"].cast(pa.string()),
            "reason": pc.fill_null(verdicts["reason"].cast(pa.string()), "kept"),
            "length": documents["length"],
        }
    )
    found: Aggregates = {}
    sums = table.group_by(["source", "reason"]).aggregate([("length", "count"), ("length", "sum")]).sort_by("source")
    for row in sums.to_pylist():
        found.setdefault(row["source"], {})[row["reason"]] = {
            "documents": row["length_count"],
            "bytes": row["length_sum"],
        }
    return found


def worst_loss(aggregates: Aggregates) -> tuple[float, str, str]:
    """(share, source, unit) where near duplicates take most of a source's distinct documents, or of their bytes."""
    losses = [(0.0, "", "documents")]
    for source, reasons in sorted(aggregates.items()):
        for unit in ("documents", "bytes"):
            near = reasons.get("near", {}).get(unit, 0)
            distinct = near + reasons.get("kept", {}).get(unit, 0)
            losses.append((near / max(distinct, 1), source, unit))
    return max(losses, key=lambda loss: loss[0])


def alarm(aggregates: Aggregates, limit: float, clusters: list[str]) -> str:
    """What to say where `worst_loss` is over the limit; clusters: a description of each of the source's largest."""
    share, source, unit = worst_loss(aggregates)
    return "\n".join(
        [
            f"source {source}: near duplicates would take {share:.1%} of its {unit} (exact copies apart), more than "
            f"dedup.max_source_loss allows ({limit:.1%}); nothing has been removed",
            "the largest clusters of near duplicates there:",
            *clusters,
            "see one with --explain DOC; raise dedup.threshold if they should stay, or allow the loss with "
            f"dedup.max_source_loss: {np.ceil(share * 100) / 100:.2f}",
        ]
    )
