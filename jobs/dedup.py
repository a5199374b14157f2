"""Dedup job: removes exact and near duplicates over the whole corpus, each removal verified against a kept document.

signatures (map) -> pairs (exchange by bucket) -> shingles (exchange to the document's partition; pairs that lie in it
whole are verified there) -> verified (exchange of the others to their first document's partition) -> verdicts (global)
-> loss (map) -> dedup (map).
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
from dataprep.storage import Attempt, Commit, UserError, read_table
from dedup import candidates, keepers, report, verify
from dedup.config import DedupConfig
from dedup.signatures import SCHEMA as SIGNATURES
from dedup.signatures import signatures
from jobs import corpus
from jobs.config import Config
from jobs.corpus import Partition
from jobs.dedup_report import Found, losses
from jobs.engine import Engine, Step, Task, once_per_run
from jobs.progress import say
from jobs.tables import show

VERSION = 3
ROW_BYTES = 33  # of a bucket row
RANGE_BYTES = 256 << 20  # of bucket rows that one task sorts


@once_per_run
def build(engine: Engine, config: Config) -> list[Commit]:
    """Bring the verdicts up to date: one commit per corpus partition, in their order. UserError if a source would lose
    too much."""
    found = find(engine, config)
    gone = found.verdicts.path("removed")
    tasks = [
        Task(
            s.key,
            {"signatures": s.fingerprint, "removed": found.verdicts.fingerprint},
            (s.path("signatures"), gone),
            s.bytes,
        )
        for s in found.signed
    ]
    losses = engine.map(Step("dedup-loss", VERSION), count_losses, tasks)
    sums = storage.add_up(c.aggregates["sources"] for c in losses)
    if report.worst_loss(sums)[0] > config.dedup.max_source_loss:
        raise UserError(report.alarm(sums, config.dedup.max_source_loss, found.worst_clusters(sums)))
    tasks = [
        Task(t.key, {**t.inputs, "loss": c.fingerprint}, (*t.args, c.aggregates["sources"]), t.bytes)
        for t, c in zip(tasks, losses, strict=True)
    ]
    return engine.map(Step("dedup", VERSION), judge_partition, tasks)


@once_per_run
def find(engine: Engine, config: Config) -> Found:
    """All that comes before anything is final."""
    dedup, partitions = config.dedup, corpus.partitions(engine, config)
    # The layout stands for the numbers it is made from: another threshold alone computes no signature anew.
    about = dedup.model_dump(mode="json", exclude={"max_source_loss", "threshold", "permutations", "bands", "rows"})
    step = Step("dedup-signatures", VERSION, about | {"layout": list(dedup.layout), "unicode": unidata_version})
    signed = engine.map(step, sign_partition, [p.task(dedup) for p in partitions])
    edges = find_edges(engine, dedup, partitions, signed)
    inputs = {f"{c.directory.rsplit('/', 1)[-1]}/{c.key}": c.fingerprint for c in edges}
    paths = [c.path("edges") for c in edges]
    verdicts = engine.once(
        Step("dedup-verdicts", VERSION), choose, Task("all", inputs, (paths,), sum(c.bytes for c in edges))
    )
    return Found(engine.root, signed, verdicts)


def find_pairs(engine: Engine, signed: list[Commit]) -> list[Commit]:
    """Commits with the tables `edges` (exact copies) and `near` (candidates, repeated if found in several buckets)."""
    rows = sum(c.aggregates["rows"] for c in signed)
    ranges = max(1, math.ceil(rows * ROW_BYTES / RANGE_BYTES))
    tasks = [
        Task(c.key, {"signatures": c.fingerprint}, (c.path("signatures"), ranges), c.aggregates["rows"] * ROW_BYTES)
        for c in signed
    ]
    return engine.exchange(Step("dedup-pairs", VERSION), cut_buckets, tasks, ranges, pair_buckets)


def find_edges(engine: Engine, dedup: DedupConfig, partitions: list[Partition], signed: list[Commit]) -> list[Commit]:
    """Commits with an `edges` table each: exact ones from the pairs step, verified near ones."""
    pairs = find_pairs(engine, signed)
    if not dedup.near or not partitions:
        return pairs
    about = {"shingle": dedup.shingle, "threshold": dedup.threshold, "unicode": unidata_version}
    starts = [c.aggregates["first_doc"] for c in signed]
    # Text decides what is verified: the partitions' own fingerprints are inputs beside the pairs'.
    corpus_print = storage.fingerprint([[p.key, p.fingerprint] for p in partitions])
    documents = [p.documents for p in partitions]
    weights = [p.task(dedup).bytes for p in partitions]  # text is what these tasks read most of

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
        lambda r: (documents[r], starts, dedup),
        weights,
    )
    verified = engine.exchange(
        Step("dedup-verified", VERSION, about),
        cut_by_partition,
        route(shingled, "shingled", "first"),
        len(partitions),
        verify_partition,
        lambda r: (documents[r], dedup),
        weights,
    )
    return [*pairs, *shingled, *verified]


def sign_partition(out: Attempt, path: str, dedup: DedupConfig) -> dict:
    groups = storage.read_groups(path, ["doc", "source", "text", "content_hash"])
    table = pa.concat_tables([SIGNATURES.empty_table(), *(signatures(g, dedup) for g in groups)]).unify_dictionaries()
    table = table.combine_chunks()
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
    return table, _partition_of(table[column], starts)


def _partition_of(docs: pa.ChunkedArray, starts: list[int]) -> np.ndarray:
    return np.searchsorted(np.array(starts, np.uint64), docs.to_numpy(), side="right") - 1


def shingle_partition(
    out: Attempt, pairs: pa.Table, number: int, documents: str, starts: list[int], dedup: DedupConfig
) -> dict:
    """The candidates of one partition: verified if their firsts lie in it too, else sent on with their shingles."""
    pairs = distinct_pairs(pairs)
    here = pa.array(_partition_of(pairs["first"], starts) == number)
    inside, outside = pairs.filter(here), pairs.filter(pc.invert(here))
    sets = _shingle_sets(documents, [pairs["doc"], inside["first"]], dedup)
    edges = verify.verify(inside, sets, sets, dedup.threshold)
    out.arrow("edges", [edges], edges.schema)
    places = pc.index_in(outside["doc"], sets["doc"].combine_chunks())
    outside = outside.append_column("shingles", sets["shingles"].take(places))
    out.arrow("shingled", [outside], outside.schema)
    return {"pairs": len(inside), "verified": len(edges), "sent": len(outside)}


def distinct_pairs(pairs: pa.Table) -> pa.Table:
    """Each pair once though several buckets found it, sorted."""
    return pairs.group_by(candidates.PAIRS.names).aggregate([]).sort_by([("doc", "ascending"), ("first", "ascending")])


def verify_partition(out: Attempt, pairs: pa.Table, number: int, documents: str, dedup: DedupConfig) -> dict:
    """The pairs whose earlier document lies in this partition, verified by exact Jaccard similarity."""
    pairs = pairs.sort_by([("doc", "ascending"), ("first", "ascending")])
    firsts = _shingle_sets(documents, [pairs["first"]], dedup)
    sets = pairs.select(["doc", "shingles"])
    edges = verify.verify(pairs.drop_columns(["shingles"]), sets, firsts, dedup.threshold)
    out.arrow("edges", [edges], edges.schema)
    return {"pairs": len(pairs), "verified": len(edges)}


def _shingle_sets(documents: str, docs: list[pa.ChunkedArray], dedup: DedupConfig) -> pa.Table:
    wanted = np.unique(np.concatenate([d.to_numpy() for d in docs]))
    if not len(wanted):
        return verify.SETS.empty_table()
    groups = storage.read_groups(documents, ["doc", "text"])
    return pa.concat_tables(verify.shingle_sets(g, wanted, dedup) for g in groups).combine_chunks()


def choose(out: Attempt, paths: list[str]) -> dict:
    edges = pa.concat_tables([read_table(p) for p in paths])
    ranks = pa.concat_tables(
        [edges.select(["doc", "rank"]), edges.select(["first", "first_rank"]).rename_columns(["doc", "rank"])]
    )
    removed = keepers.choose(edges.filter(edges["exact"]), edges.filter(pc.invert(edges["exact"])), ranks)
    out.table("removed", removed)  # sorted by doc: read by range
    clusters = keepers.clusters(removed)
    out.table("clusters", clusters)
    return {"removed": len(removed), "clusters": len(clusters)}


def count_losses(out: Attempt, path: str, removed: str) -> dict:
    table = read_table(path, ["doc", "source", "length"])
    return {"sources": report.aggregates(table, _verdicts(table["doc"], removed))}


def judge_partition(out: Attempt, path: str, removed: str, sources: report.Aggregates) -> dict:
    out.table("dedup", _verdicts(read_table(path, ["doc"])["doc"], removed))
    return {"sources": sources}


def _verdicts(docs: pa.ChunkedArray, removed: str) -> pa.Table:
    if not len(docs):
        return report.attributes(docs.to_numpy(), keepers.REMOVED.empty_table())
    bounds = pc.min_max(docs).as_py()
    with storage.arrow_file(removed) as file:
        gone = pq.read_table(file, filters=[("doc", ">=", bounds["min"]), ("doc", "<=", bounds["max"])])
    return report.attributes(docs.to_numpy(), gone)


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--explain", metavar="DOC", type=int, help="why this document (a number) is removed or kept")


def main(engine: Engine, config: Config, arguments: argparse.Namespace) -> None:
    if getattr(arguments, "explain", None) is not None:
        for line in find(engine, config).explanation(arguments.explain):
            print(line)
    else:
        commits = build(engine, config)
        clusters = find(engine, config).verdicts
        show(losses(storage.add_up(c.aggregates["sources"] for c in commits)))
        say(f"{clusters.aggregates['clusters']:,} clusters of duplicates: {clusters.path('clusters')}")


if __name__ == "__main__":
    from jobs.cli import run

    run("dedup")
