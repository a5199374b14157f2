"""Deduplication's speed beside datasketch, rensa and datatrove: `python -m benchmarks.dedup_speed --corpus DIR`.

Signatures: text in memory to 14 bands of 8, one core, CPU seconds; beside the peers, on to candidate pairs. Whole jobs:
from the same committed corpus to verdicts, on the same number of workers; ours with a warm Ray and exact
verification, which the others do not do.
A peer that is not installed is left out.
"""

import re
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks import common
from benchmarks.common import cpu_seconds
from dataprep.storage import array_buffers, read_table
from dedup import candidates, verify
from dedup.config import DedupConfig
from dedup.signatures import signatures
from jobs import corpus, dedup
from jobs.config import Config
from jobs.corpus import Partition
from jobs.engine import Engine

PERMUTATIONS, BANDS, ROWS, SHINGLE = 112, 14, 8, 5
WORD = re.compile(r"\w+")


def plain_shingles(text: str) -> list[str]:
    """Word 5-grams as anyone would make them in Python; letters of Chinese and Thai are not words of their own here."""
    words = WORD.findall(text.lower())
    return [" ".join(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)]


def with_ours(documents: pa.Table) -> None:
    candidates.pairs(candidates.bucket_rows(signatures(documents, DedupConfig())))


def with_datasketch(documents: pa.Table) -> None:
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, ROWS))
    for number, text in enumerate(documents["text"].to_pylist()):
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([shingle.encode() for shingle in plain_shingles(text)])
        index.query(sketch)
        index.insert(number, sketch)


def with_rensa(documents: pa.Table) -> None:
    from rensa import RMinHash, RMinHashLSH

    index = RMinHashLSH(threshold=0.8, num_perm=PERMUTATIONS, num_bands=BANDS)
    for number, text in enumerate(documents["text"].to_pylist()):
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=0)
        sketch.update(plain_shingles(text))
        index.query(sketch)
        index.insert(number, sketch)


PEERS = {"rensa": with_rensa, "datasketch": with_datasketch}


def by_source(partitions: list[Partition]) -> dict[str, pa.Table]:
    parts = defaultdict(list)
    for partition in partitions:
        parts[partition.source].append(read_table(partition.documents, ["doc", "source", "text", "content_hash"]))
    return {source: pa.concat_tables(tables).unify_dictionaries().combine_chunks() for source, tables in parts.items()}


def signature_speeds(sources: dict[str, pa.Table], sample_mb: float) -> dict[str, float]:
    """MB per CPU second: all bytes over all time, the slowest source, and the peers on a sample of every source."""
    pa.set_cpu_count(1)
    total, slowest = common.speeds("signatures", sources, lambda documents: signatures(documents, DedupConfig()))
    figures = {"signature_mb_s_core": total, "slowest_source_mb_s_core": slowest}
    sample = []
    for documents in sources.values():
        offsets = array_buffers(documents["text"])[1]
        sample.append(documents[: np.searchsorted(offsets, sample_mb * 1e6 / len(sources))])
    documents = pa.concat_tables(sample).unify_dictionaries()
    size = common.megabytes(documents)
    taken = {"ours": cpu_seconds(lambda: with_ours(documents), 3)}
    for name, run in PEERS.items():
        if common.installed(name):
            run(documents.slice(0, 2))
            taken[name] = cpu_seconds(lambda run=run: run(documents))
            figures |= {f"{name}_mb_s_core": size / taken[name], f"vs_{name}": taken[name] / taken["ours"]}
    rows = [(name, f"{size / seconds:.2f}") for name, seconds in taken.items()]
    common.table(f"candidate pairs, {size:.1f} MB of all sources", ("library", "MB/s per core"), rows)
    return figures


def warm() -> None:
    """What a worker does once in its life: imports, tables, kernels from their cache."""
    text = pa.table({"doc": pa.array([0, 1], pa.uint64()), "text": pa.array(["a b c d e f"] * 2, pa.large_string())})
    text = text.append_column("source", pa.array(["x"] * 2))
    with_ours(text.append_column("content_hash", pa.array([b"0" * 16] * 2, pa.binary(16))))
    sets = verify.shingle_sets(text, np.array([0, 1], np.uint64), DedupConfig())
    verify.verify(pa.table({"doc": text["doc"][:1], "first": text["doc"][1:]}), sets, sets, 0.8)


def job(config: Config, workers: int) -> tuple[float, float]:
    return common.job(config, workers, dedup.build, warm)


def committed(root: str, files: dict[str, Path], workers: int) -> tuple[Config, list[Partition], float]:
    """These sources as a committed corpus: configuration, partitions, megabytes of text."""
    config = common.configuration(root, files, workers)
    with Engine(root, workers) as engine:
        size = sum(corpus.totals(corpus.build(engine, config), "bytes").values()) / 1e6
        return config, corpus.partitions(engine, config), size


def datatrove_seconds(partitions: list[Partition], workers: int) -> float:
    """Wall seconds of datatrove's four MinHash stages on the same Parquet files."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import ParquetReader

    settings = minhash.MinhashConfig(n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        for number, partition in enumerate(partitions):
            (Path(folder) / "in" / f"{number:05d}.parquet").symlink_to(partition.documents)
        reader = ParquetReader(f"{folder}/in", glob_pattern="*.parquet", text_key="text", id_key="id")
        signed, buckets, remove = (f"{folder}/{name}" for name in ("signatures", "buckets", "remove"))
        stages = [
            ([reader, minhash.MinhashDedupSignature(signed, settings)], len(partitions)),
            ([minhash.MinhashDedupBuckets(signed, buckets, config=settings)], BANDS),
            ([minhash.MinhashDedupCluster(buckets, remove, settings)], 1),
            ([reader, minhash.MinhashDedupFilter(remove)], len(partitions)),
        ]
        began = time.perf_counter()
        for number, (pipeline, tasks) in enumerate(stages):
            LocalPipelineExecutor(pipeline, tasks, workers, logging_dir=f"{folder}/logs/{number}").run()
        return time.perf_counter() - began


def against_datatrove(files: dict[str, Path], most_mb: float, workers: int) -> dict[str, float]:
    """Both on the same sources, smallest first, up to about `most_mb` of text."""
    sizes = np.cumsum([path.stat().st_size for path in files.values()]) * 5 / 1e6
    taken = dict(list(files.items())[: max(1, int(np.searchsorted(sizes, most_mb, "right")))])
    with tempfile.TemporaryDirectory() as root:
        config, partitions, size = committed(root, taken, workers)
        ours, theirs = job(config, workers)[0], datatrove_seconds(partitions, workers)
    print(f"  {len(taken)} sources, {size:.1f} MB: ours {ours:.1f} s, datatrove {theirs:.1f} s, {workers} workers")
    return {"datatrove_mb": size, "datatrove_mb_s": size / theirs, "vs_datatrove": theirs / ours}


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--datatrove-mb", type=float, default=100, help="text that datatrove gets; 0: not at all")
    arguments = parser.parse_args()
    files, workers = common.sources(arguments.corpus, 6 if arguments.quick else None), arguments.workers
    datatrove = arguments.datatrove_mb and common.installed("datatrove", "spacy")  # it splits words with spacy
    peers = [name for name in PEERS if common.installed(name)] + ["datatrove"] * bool(datatrove)
    print(f"{len(files)} sources, {common.about(*peers)}")
    print("takes about 2 minutes and, with datatrove, 1 s more per MB of --datatrove-mb (--quick: less than a minute)")
    with tempfile.TemporaryDirectory() as root:
        config, partitions, size = committed(root, files, workers)
        seconds, memory = job(config, workers)
        print(f"  job: {size:.1f} MB in {seconds:.1f} s, {workers} workers")
        figures = {"job_mb_s": size / seconds, "job_seconds": seconds, "peak_rss_mb": memory}
        if not arguments.quick:
            figures["two_worker_speedup"] = common.two_worker_speedup(lambda n: job(config, n)[0], 5)
        figures |= signature_speeds(by_source(partitions), 1 if arguments.quick else 10)
    if datatrove:
        figures |= against_datatrove(files, 5 if arguments.quick else arguments.datatrove_mb, workers)
    common.report(arguments.json, figures)


if __name__ == "__main__":
    main()
