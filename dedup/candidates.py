"""Candidate pairs: documents that share a bucket, each paired with the bucket's first in keeper order.

Pairing with the first only keeps a bucket of k documents at k - 1 pairs, however large it is.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kernels import edges

ROWS = pa.schema(
    {"key": pa.uint64(), "exact": pa.bool_(), "check": pa.uint64(), "rank": pa.uint64(), "doc": pa.uint64()}
)
PAIRS = pa.schema(
    {"doc": pa.uint64(), "rank": pa.uint64(), "first": pa.uint64(), "first_rank": pa.uint64(), "exact": pa.bool_()}
)


def bucket_rows(signatures: pa.Table) -> pa.Table:
    """The rows to exchange by `key`: an exact row for every document, a near row for every band key.

    key and check are the halves of the content hash in exact rows; in near rows key is the band's and check a half of
    the content hash, by which exact copies know each other.
    """
    bands = signatures["bands"].combine_chunks()
    each = pc.list_value_length(bands).to_numpy(zero_copy_only=False)
    repeated = [np.repeat(signatures[name].to_numpy(), each) for name in ("hash_low", "rank", "doc")]
    exact = signatures.select(["hash_low", "hash_high", "rank", "doc"]).rename_columns(["key", "check", "rank", "doc"])
    exact = exact.append_column("exact", pa.array(np.ones(len(exact), bool)))
    near = pa.table([bands.flatten(), np.zeros(len(repeated[0]), bool), *repeated], schema=ROWS)
    return pa.concat_tables([exact.select(ROWS.names), near])


def pairs(rows: pa.Table) -> pa.Table:
    """PAIRS for every member of a bucket but its first: both with their ranks; no pair twice; near ones first.

    rows: as from `bucket_rows`, whole buckets, in any order. In near buckets only the first of a group of exact copies
    takes part: its copies follow it anyway.
    """
    rows = rows.filter(pa.array(edges.crowded(rows["key"].to_numpy())))  # few, so that what comes after is cheap
    near = rows.filter(pc.invert(rows["exact"]))
    order, leads, _ = _buckets(near, ["key", "check"])
    near = near.take(order[leads])
    order, leads, first = _buckets(near, ["key"])
    near = _pairs(near, order[~leads], first[~leads], exact=False)

    exact = rows.filter(rows["exact"])
    order, leads, first = _buckets(exact, ["key", "check"])
    return pa.concat_tables([near, _pairs(exact, order[~leads], first[~leads], exact=True)])


def _buckets(rows: pa.Table, names: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows sorted into buckets of equal values in the named columns, each bucket in keeper order.

    Returns, in sorted order: the row's index, whether it leads its bucket, and the index of the row that does.
    """
    columns = [rows[name].to_numpy() for name in names]
    order = np.lexsort((rows["doc"].to_numpy(), rows["rank"].to_numpy(), *columns))
    leads = np.zeros(len(order), bool)
    leads[:1] = True
    for column in columns:
        leads[1:] |= column[order[1:]] != column[order[:-1]]
    return order, leads, order[leads][np.cumsum(leads) - 1]


def _pairs(rows: pa.Table, members: np.ndarray, firsts: np.ndarray, exact: bool) -> pa.Table:
    """The pairs of two lists of rows, sorted by doc and first, each once."""
    doc, rank = rows["doc"].to_numpy(), rows["rank"].to_numpy()
    order = np.lexsort((doc[firsts], doc[members]))
    members, firsts = members[order], firsts[order]
    new = np.ones(len(order), bool)
    new[1:] = (doc[members[1:]] != doc[members[:-1]]) | (doc[firsts[1:]] != doc[firsts[:-1]])
    members, firsts = members[new], firsts[new]
    columns = [doc[members], rank[members], doc[firsts], rank[firsts], np.full(len(members), exact)]
    return pa.table(columns, schema=PAIRS)
