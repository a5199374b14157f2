"""Dedup job: removes exact and near duplicates over the whole corpus, each removal verified against a kept document.

signatures (map) -> pairs (exchange by bucket) -> candidates (exchange to the later document's partition)
-> verified edges (exchange to the earlier document's partition) -> verdicts (global) -> dedup (map).
"""

if not __package__:  # run as a script
    import _script  # noqa: F401

import argparse
import math
from collections.abc import Sequence
from unicodedata import unidata_version  # letters and digits are as this version has them

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dataprep import storage
from dataprep.storage import Attempt, Commit, read_table
from dedup import candidates, keepers, report, verify
from dedup.config import DedupConfig
from dedup.signatures import signatures
from jobs import corpus
from jobs.config import Config
from jobs.corpus import Partition
from jobs.engine import Engine, Step, Task, once_per_run
from jobs.progress import say

VERSION = 1
ROW_BYTES = 33  # of a bucket row
RANGE_BYTES = 256 << 20  # of bucket rows that one task sorts


@once_per_run
def build(engine: Engine, config: Config) -> list[Commit]:
    """Bring the verdicts up to date: one commit per corpus partition, in their order."""
    dedup, partitions = config.dedup, corpus.partitions(engine, config)
    about = dedup.model_dump(mode="json", exclude={"max_source_loss"}) | {"unicode": unidata_version}
    step = Step("dedup-signatures", VERSION, about)
    signed = engine.map(step, sign_partition, [p.task(dedup) for p in partitions])
    edges = find_edges(engine, dedup, partitions, signed)
    inputs = {f"{c.directory.rsplit('/', 1)[-1]}/{c.key}": c.fingerprint for c in edges}
    paths = [c.path("edges") for c in edges]
    verdicts = engine.once(
        Step("dedup-verdicts", VERSION), choose, Task("all", inputs, (paths,), sum(c.bytes for c in edges))
    )
    tasks = [
        Task(
            s.key,
            {"signatures": s.fingerprint, "removed": verdicts.fingerprint},
            (s.path("signatures"), p.documents, verdicts.path("removed")),
            s.bytes,
        )
        for p, s in zip(partitions, signed, strict=True)
    ]
    commits = engine.map(Step("dedup", VERSION), judge_partition, tasks)
    report.check_loss(report.total(c.aggregates["sources"] for c in commits), dedup.max_source_loss)
    return commits


def find_edges(engine: Engine, dedup: DedupConfig, partitions: list[Partition], signed: list[Commit]) -> list[Commit]:
    """Commits with an `edges` table each: exact ones from the pairs step, verified near ones."""
    rows = sum(c.aggregates["rows"] for c in signed)
    ranges = max(1, math.ceil(rows * ROW_BYTES / RANGE_BYTES))
    tasks = [
        Task(c.key, {"signatures": c.fingerprint}, (c.path("signatures"), ranges), c.aggregates["rows"] * ROW_BYTES)
        for c in signed
    ]
    pairs = engine.exchange(Step("dedup-pairs", VERSION), cut_buckets, tasks, ranges, pair_buckets)
    if not dedup.near or not partitions:
        return pairs
    about = {"shingle": dedup.shingle, "threshold": dedup.threshold, "unicode": unidata_version}
    starts = [c.aggregates["first_doc"] for c in signed]  # partitions hold ascending documents, so these route any doc
    # Text decides what is verified: the partitions' own fingerprints are inputs beside the pairs'.
    corpus_print = storage.fingerprint([[p.key, p.fingerprint] for p in partitions])
    documents = [p.documents for p in partitions]

    def route(commits: Sequence[Commit], name: str, column: str) -> list[Task]:
        return [
            Task(c.key, {name: c.fingerprint, "corpus": corpus_print}, (c.path(name), starts, column), c.bytes)
            for c in commits
        ]

    shingled = engine.exchange(
        Step("dedup-shingles", VERSION, about),
        cut_by_partition,
        route(pairs, "near", "doc"),
        len(partitions),
        shingle_partition,
        lambda r: (documents[r], dedup),
    )
    verified = engine.exchange(
        Step("dedup-verified", VERSION, about),
        cut_by_partition,
        route(shingled, "shingled", "first"),
        len(partitions),
        verify_partition,
        lambda r: (documents[r], dedup),
    )
    return [*pairs, *verified]


def sign_partition(out: Attempt, path: str, dedup: DedupConfig) -> dict:
    table = signatures(read_table(path, ["doc", "source", "text", "content_hash"]), dedup)
    out.arrow("signatures", [table], table.schema)
    keys = pc.sum(pc.list_value_length(table["bands"])).as_py() or 0
    return {"documents": len(table), "rows": len(table) + keys, "first_doc": pc.min(table["doc"]).as_py() or 0}


def cut_buckets(path: str, ranges: int) -> tuple[pa.Table, np.ndarray]:
    rows = candidates.bucket_rows(read_table(path))
    high = rows["key"].to_numpy() >> np.uint64(32)
    return rows, ((high * np.uint64(ranges)) >> np.uint64(32)).astype(np.int64)


def pair_buckets(out: Attempt, rows: pa.Table, number: int) -> dict:
    found = candidates.pairs(rows)
    exact, near = found.filter(found["exact"]), found.filter(pc.invert(found["exact"]))
    exact = exact.append_column("jaccard", pa.array(np.ones(len(exact))))
    out.arrow("edges", [exact], exact.schema)
    out.arrow("near", [near], near.schema)
    return {"exact": len(exact), "near": len(near)}


def cut_by_partition(path: str, starts: list[int], column: str) -> tuple[pa.Table, np.ndarray]:
    """Rows to the partition that holds the document in `column`."""
    table = read_table(path)
    return table, np.searchsorted(np.array(starts, np.uint64), table[column].to_numpy(), side="right") - 1


def shingle_partition(out: Attempt, pairs: pa.Table, number: int, documents: str, dedup: DedupConfig) -> dict:
    """The candidates of one partition with their shingles, each pair once though several buckets found it."""
    pairs = pairs.group_by(candidates.PAIRS.names).aggregate([]).sort_by([("doc", "ascending"), ("first", "ascending")])
    sets = _shingle_sets(documents, pairs["doc"], dedup)
    pairs = pairs.append_column(
        "shingles", sets["shingles"].take(pc.index_in(pairs["doc"], sets["doc"].combine_chunks()))
    )
    out.arrow("shingled", [pairs], pairs.schema)
    return {"pairs": len(pairs)}


def verify_partition(out: Attempt, pairs: pa.Table, number: int, documents: str, dedup: DedupConfig) -> dict:
    """The pairs whose earlier document lies in this partition, verified by exact Jaccard similarity."""
    pairs = pairs.sort_by([("doc", "ascending"), ("first", "ascending")])
    firsts = _shingle_sets(documents, pairs["first"], dedup)
    sets = pairs.select(["doc", "shingles"])
    edges = verify.verify(pairs.drop_columns(["shingles"]), sets, firsts, dedup.threshold)
    out.arrow("edges", [edges], edges.schema)
    return {"pairs": len(pairs), "verified": len(edges)}


def _shingle_sets(documents: str, docs: pa.ChunkedArray, dedup: DedupConfig) -> pa.Table:
    wanted = np.unique(docs.to_numpy())
    if not len(wanted):
        return verify.SETS.empty_table()
    return verify.shingle_sets(read_table(documents, ["doc", "text"]), wanted, dedup)


def choose(out: Attempt, paths: list[str]) -> dict:
    edges = pa.concat_tables([read_table(p) for p in paths])
    ranks = pa.concat_tables(
        [edges.select(["doc", "rank"]), edges.select(["first", "first_rank"]).rename_columns(["doc", "rank"])]
    )
    removed = keepers.choose(edges.filter(edges["exact"]), edges.filter(pc.invert(edges["exact"])), ranks)
    with out.file("removed", ".parquet") as path:
        pq.write_table(removed, path, compression="zstd", row_group_size=1 << 16)  # sorted by doc: read by range
    return {"removed": len(removed)}


def judge_partition(out: Attempt, path: str, documents: str, removed: str) -> dict:
    table = read_table(path, ["doc", "length"])
    docs = table["doc"]
    if len(docs):
        low, high = pc.min(docs).as_py(), pc.max(docs).as_py()
        with storage.arrow_file(removed) as file:
            gone = pq.read_table(file, filters=[("doc", ">=", low), ("doc", "<=", high)])
    else:
        gone = keepers.REMOVED.empty_table()
    verdicts = report.attributes(docs.to_numpy(), gone)
    out.table("dedup", verdicts)
    source = read_table(documents, ["source"])["source"]
    return {"sources": report.aggregates(pa.table({"source": source, "length": table["length"]}), verdicts)}


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    sums = report.total(c.aggregates["sources"] for c in build(engine, config))
    for source, reasons in sorted(sums.items()):
        counts = {name: reasons.get(name, {}).get("documents", 0) for name in ("kept", "exact", "near")}
        share = counts["kept"] / max(1, sum(counts.values()))
        say(
            f"{source}: kept {counts['kept']:,} ({share:.1%}), "
            f"removed {counts['exact']:,} exact and {counts['near']:,} near"
        )


if __name__ == "__main__":
    from jobs.cli import run

    run("dedup")
