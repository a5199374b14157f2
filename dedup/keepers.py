"""Which documents go, and for whose sake: greedy in keeper order, one verified edge per removal.

No transitive collapse: where A ~ B and B ~ C, C goes only if it is a duplicate of a document that stays.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kernels import edges

REMOVED = pa.schema(
    {
        "doc": pa.uint64(),
        "reason": pa.dictionary(pa.int32(), pa.string()),
        "keeper": pa.uint64(),
        "jaccard": pa.float32(),
        "cluster": pa.uint64(),
    }
)
REASONS = ["exact", "near"]
CLUSTERS = pa.schema(
    {
        "cluster": pa.uint64(),
        "documents": pa.int64(),
        "exact": pa.int64(),
        "near": pa.int64(),
        "least_jaccard": pa.float32(),
    }
)


def choose(exact: pa.Table, near: pa.Table, ranks: pa.Table) -> pa.Table:
    """The removed documents, sorted by doc: (doc, reason, keeper, jaccard, cluster).

    exact: (doc, first), first being the group's first in keeper order. near: verified (doc, first, jaccard) between
    documents that are in no `doc` of exact. ranks: (doc, rank) of at least all of them; repeats do no harm.
    Every keeper stays. An exact copy whose first goes as a near duplicate takes over its keeper and jaccard.
    """
    docs, rows = np.unique(ranks["doc"].to_numpy(), return_index=True)
    docs = docs[np.lexsort((docs, ranks["rank"].to_numpy()[rows]))]  # from here on a document is its place in here

    one, other = _places(near["doc"], docs), _places(near["first"], docs)
    later, earlier = np.maximum(one, other), np.minimum(one, other)
    order = np.lexsort((earlier, later))
    keeper, similarity = edges.keepers(len(docs), later[order], earlier[order], near["jaccard"].to_numpy()[order])

    copies, firsts = _places(exact["doc"], docs), _places(exact["first"], docs)
    keeper[copies], similarity[copies] = keeper[firsts], similarity[firsts]
    reason = np.full(len(docs), REASONS.index("near"), np.int32)
    reason[copies] = REASONS.index("exact")

    removed = np.flatnonzero(keeper != np.arange(len(docs)))
    removed = removed[np.argsort(docs[removed])]
    kept = docs[keeper[removed]]
    reasons = pa.DictionaryArray.from_arrays(pa.array(reason[removed]), pa.array(REASONS))
    return pa.table([docs[removed], reasons, kept, similarity[removed].astype(np.float32), kept], schema=REMOVED)


def clusters(removed: pa.Table) -> pa.Table:
    """What every keeper stands for, largest first: how many documents with itself, removed by reason, the least alike.

    removed: as from `choose`. cluster is the keeper's doc, as in the removed documents' rows.
    """
    near = pc.equal(removed["reason"].cast(pa.string()), "near")
    table = pa.table({"cluster": removed["cluster"], "near": near.cast(pa.int64()), "jaccard": removed["jaccard"]})
    sums = table.group_by("cluster").aggregate([("near", "count"), ("near", "sum"), ("jaccard", "min")])
    count, near = sums["near_count"], sums["near_sum"]
    columns = [sums["cluster"], pc.add(count, 1), pc.subtract(count, near), near, sums["jaccard_min"]]
    return pa.table(columns, schema=CLUSTERS).sort_by([("documents", "descending"), ("cluster", "ascending")])


def _places(wanted: pa.ChunkedArray, docs: np.ndarray) -> np.ndarray:
    places = pc.index_in(wanted, value_set=pa.array(docs))
    if places.null_count:
        raise KeyError(f"no rank for document {wanted.filter(places.is_null())[0]}")
    return places.to_numpy().astype(np.int64)
