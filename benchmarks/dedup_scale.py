"""Candidates and the greedy pass at scale, on synthetic band keys: `python -m benchmarks.dedup_scale`.

Runs the job's own steps on made-up signatures: a third of the documents in planted clusters, one of them of a fortieth.
Members share most band keys with their cluster and none with anyone else; a pair is taken as verified if both are of
one cluster, so the result is known: one document of each cluster stays.
"""

import tempfile
import time

import numpy as np
import pyarrow as pa

from benchmarks import common
from dataprep.storage import Attempt
from dedup.signatures import SCHEMA
from jobs import dedup
from jobs.engine import Engine, Step, Task
from kernels.words import mix

BANDS = 14
PARTITION = 500_000  # documents
GIANT = 1 / 40  # of all documents are in the largest cluster: 500,000 of 20 million
SHARED = 0.85  # probability that a member has its cluster's key in a band


def cluster_of(docs: np.ndarray, total: int) -> np.ndarray:
    """Planted clusters, by hash: a giant, as much as makes a third of all in clusters of 8 on average, nobody's."""
    hashes = mix(docs + np.uint64(1))
    place = hashes.astype(np.float64) / 2.0**64
    clustered = 1 / 3
    small = hashes % np.uint64(max(1, int((clustered - GIANT) * total / 8)))
    alone = docs + np.uint64(1 << 40)
    return np.where(place < GIANT, np.uint64(1 << 41), np.where(place < clustered, small, alone))


def make_partition(out: Attempt, number: int, size: int, total: int) -> dict:
    """Signatures of `size` documents."""
    docs = np.arange(number * PARTITION, number * PARTITION + size, dtype=np.uint64)
    own = mix(docs * np.uint64(3) + np.uint64(7))
    cluster = mix(cluster_of(docs, total))
    band = np.arange(BANDS, dtype=np.uint64)
    own_keys = mix((own[:, None] + band).ravel()).reshape(-1, BANDS)
    shared_keys = mix((cluster[:, None] ^ (band << np.uint64(32))).ravel()).reshape(-1, BANDS)
    chance = mix((own[:, None] * np.uint64(5) + band).ravel()).reshape(-1, BANDS).astype(np.float64) / 2.0**64
    keys = np.where(chance < SHARED, shared_keys, own_keys)
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(size, np.int32)), pa.array(["made"]))
    lists = pa.LargeListArray.from_arrays(pa.array(np.arange(size + 1) * BANDS), pa.array(keys.ravel()))
    numbers = pa.array(np.full(size, 1000, np.uint64))
    columns = [pa.array(docs), names, pa.array(mix(own)), pa.array(own), pa.array(mix(own + np.uint64(9)))]
    table = pa.table([*columns, numbers, numbers.cast(pa.uint32()), lists], schema=SCHEMA)
    out.arrow("signatures", [table], table.schema)
    return {"documents": size, "rows": size * (1 + BANDS), "first_doc": int(docs[0])}


def take_for_verified(out: Attempt, pairs: pa.Table, number: int, total: int) -> dict:
    """In place of the verification: pairs of one cluster are similar."""
    pairs = dedup.distinct_pairs(pairs)
    doc, first = pairs["doc"].to_numpy(), pairs["first"].to_numpy()
    pairs = pairs.append_column("jaccard", pa.array(0.8 + (doc ^ first).astype(np.float64) / 2.0**64 / 8))
    pairs = pairs.filter(pa.array(cluster_of(doc, total) == cluster_of(first, total)))
    out.arrow("edges", [pairs], pairs.schema)
    return {"verified": len(pairs)}


def measure(total: int, workers: int) -> dict[str, float]:
    """Seconds (without making the signatures), peak memory in MB of the process and its workers, edges, removals."""
    starts = list(range(0, total, PARTITION))
    made = [Task(f"{i:05d}", {}, (i, min(PARTITION, total - s), total)) for i, s in enumerate(starts)]
    step = Step("dedup-verified", 1)
    with tempfile.TemporaryDirectory() as root, Engine(root, workers) as engine:
        signed = engine.map(Step("dedup-signatures", 1), make_partition, made)
        with common.Usage() as usage:
            began = time.perf_counter()
            pairs = dedup.find_pairs(engine, signed)
            tasks = [Task(c.key, {"pairs": c.fingerprint}, (c.path("near"), starts, "doc"), c.bytes) for c in pairs]
            cut, take = dedup.cut_by_partition, take_for_verified
            edges = [*pairs, *engine.exchange(step, cut, tasks, len(starts), take, lambda r: (total,))]
            candidates = time.perf_counter() - began
            task = Task("all", {}, ([c.path("edges") for c in edges],), sum(c.bytes for c in edges))
            removed = engine.once(Step("dedup-verdicts", 1), dedup.choose, task).aggregates["removed"]
            seconds = time.perf_counter() - began
    return {
        "docs": total,
        "seconds": seconds,
        "greedy_seconds": seconds - candidates,
        "cpu_seconds": usage.cpu,
        "peak_rss_mb": usage.peak / 1e6,
        "pairs": sum(c.aggregates["near"] for c in pairs),
        "removed": removed,
        "removed_share": removed / (total - len(np.unique(cluster_of(np.arange(total, dtype=np.uint64), total)))),
    }


def main() -> None:
    parser = common.parser(__doc__, reads_corpus=False)
    parser.add_argument("--docs", type=int, default=20_000_000, help="of the second run; the first: a quarter")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    total = 2_000_000 if arguments.quick else arguments.docs
    print(f"{total:,} documents x {BANDS} bands, after a quarter; {arguments.workers} workers, {common.about()}")
    print(f"takes about {total / 2e5:.0f} s and {total * 450 / 1e9:.1f} GB of disk")
    runs = [measure(docs, arguments.workers) for docs in (total // 4, total)]
    rows = [(name, *(f"{run[name]:,.4g}" for run in runs)) for name in runs[0]]
    common.table("", ("", "a quarter", "all"), rows)
    common.report(arguments.json, runs[1] | {"growth_4x": runs[1]["seconds"] / runs[0]["seconds"]})


if __name__ == "__main__":
    main()
