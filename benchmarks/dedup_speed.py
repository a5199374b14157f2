"""Deduplication's speed beside datasketch, rensa and datatrove: `python -m benchmarks.dedup_speed --corpus DIR`.

Signatures: text in memory to 14 bands of 8, one core, CPU seconds; beside the peers, on to candidate pairs. Whole jobs:
from the same committed corpus to verdicts, on the same number of workers; ours with a warm Ray and exact
verification, which the others do not do.
A peer that is not installed is left out.
"""

import importlib.util
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from benchmarks import dedup_corpus
from benchmarks.dedup_scale import Usage
from dataprep.storage import array_buffers, read_table
from dedup import candidates, verify
from dedup.config import DedupConfig
from dedup.signatures import signatures
from jobs import corpus, dedup
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


def signature_speeds(partitions: list[Partition], sample_mb: float) -> dict[str, float]:
    """MB per CPU second: all bytes over all time, the slowest source, and the peers on a sample of every source."""
    config = DedupConfig()
    pa.set_cpu_count(1)
    seconds: dict[str, float] = {}
    sizes: dict[str, int] = {}
    sample: list[pa.Table] = []
    for partition in partitions:
        table = read_table(partition.documents, ["doc", "source", "text", "content_hash"])
        source = table["source"][0].as_py()
        if source not in seconds:
            signatures(table.slice(0, 1), config)  # compile and fill caches
        offsets = array_buffers(table["text"])[1]
        took = min(cpu_seconds(lambda table=table: signatures(table, config)) for _ in range(2))
        size = int(offsets[-1] - offsets[0])
        seconds[source], sizes[source] = seconds.get(source, 0) + took, sizes.get(source, 0) + size
        ends = np.searchsorted(offsets, offsets[0] + sample_mb * 1e6 / len(partitions))
        sample.append(table.slice(0, int(ends)))
    speeds = {source: sizes[source] / 1e6 / seconds[source] for source in seconds}
    for source, speed in sorted(speeds.items(), key=lambda item: item[1]):
        print(f"  {source:36} {speed:7.1f} MB/s per core")
    figures = {
        "signature_mb_s_core": sum(sizes.values()) / 1e6 / sum(seconds.values()),
        "slowest_source_mb_s_core": min(speeds.values()),
    }
    documents = pa.concat_tables(sample, promote_options="default").unify_dictionaries()
    size = int(np.sum(pc.binary_length(documents["text"]).to_numpy()))
    ours = size / 1e6 / min(cpu_seconds(lambda: with_ours(documents)) for _ in range(3))
    print(f"  candidates of {size / 1e6:.1f} MB from all sources, MB/s per core: ours {ours:.1f}", end="")
    for name, peer in (("rensa", with_rensa), ("datasketch", with_datasketch)):
        if importlib.util.find_spec(name):
            speed = size / 1e6 / cpu_seconds(lambda peer=peer: peer(documents))
            figures |= {f"{name}_mb_s_core": speed, f"vs_{name}": ours / speed}
            print(f", {name} {speed:.2f}", end="")
    print()
    return figures


def cpu_seconds(action: Callable[[], object]) -> float:
    began = time.thread_time()
    action()
    return time.thread_time() - began


def job_seconds(base: str, config: dedup_corpus.Config, workers: int) -> tuple[float, float]:
    """(wall seconds, peak memory in MB) of the dedup job on a corpus that is already committed under `base`."""
    for path in [*Path(base).glob("dedup*"), *Path(base, "latest").glob("dedup*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Engine(base, workers) as engine:
        corpus.partitions(engine, config)
        ray = engine.ray()
        ray.get([ray.remote(warm).remote() for _ in range(4 * workers)])
        with Usage() as usage:
            began = time.perf_counter()
            dedup.build(engine, config)
            seconds = time.perf_counter() - began
    return seconds, usage.peak / 1e6


def warm() -> None:
    """What a worker does once in its life: imports, tables, kernels from their cache."""
    text = pa.table({"doc": pa.array([0, 1], pa.uint64()), "text": pa.array(["a b c d e f"] * 2, pa.large_string())})
    text = text.append_column("source", pa.array(["x"] * 2)).append_column("content_hash", pa.array([b"0" * 16] * 2))
    with_ours(text.set_column(3, "content_hash", text["content_hash"].cast(pa.binary(16))))
    sets = verify.shingle_sets(text, np.array([0, 1], np.uint64), DedupConfig())
    verify.verify(pa.table({"doc": text["doc"][:1], "first": text["doc"][1:]}), sets, sets, 0.8)


def datatrove_seconds(partitions: list[Partition], workers: int) -> float:
    """Wall seconds of datatrove's four MinHash stages on the same Parquet files."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import ParquetReader

    settings = MinhashConfig(n_grams=SHINGLE, num_buckets=BANDS, hashes_per_bucket=ROWS)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "in").mkdir()
        for number, partition in enumerate(partitions):
            (Path(folder) / "in" / f"{number:05d}.parquet").symlink_to(partition.documents)
        reader = ParquetReader(f"{folder}/in", glob_pattern="*.parquet", text_key="text", id_key="id")
        tasks = len(partitions)
        stages = [
            ([reader, MinhashDedupSignature(f"{folder}/signatures", settings)], tasks),
            ([MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/buckets", config=settings)], BANDS),
            ([MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", settings)], 1),
            ([reader, MinhashDedupFilter(f"{folder}/remove")], tasks),
        ]
        began = time.perf_counter()
        for number, (pipeline, count) in enumerate(stages):
            logs = f"{folder}/logs/{number}"
            LocalPipelineExecutor(pipeline, tasks=count, workers=workers, logging_dir=logs).run()
        return time.perf_counter() - began


def main() -> None:
    parser = dedup_corpus.parser(__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--datatrove-mb", type=float, default=100, help="text that datatrove is measured on; 0: not at all"
    )
    arguments = parser.parse_args()
    files = dedup_corpus.sources(arguments.corpus)
    if arguments.quick:
        files = dict(list(files.items())[:6])
    peers = [name for name in ("rensa", "datasketch", "datatrove") if importlib.util.find_spec(name)]
    print(f"{len(files)} sources, {dedup_corpus.about(*peers)}")
    print("takes about 2 minutes and, with datatrove, 1 s more per MB of --datatrove-mb (--quick: less than a minute)")
    workers = arguments.workers
    with tempfile.TemporaryDirectory() as root:
        config = dedup_corpus.configuration(root, files, workers)
        with Engine(root, workers) as engine:
            partitions = corpus.partitions(engine, config)
            size = sum(corpus.totals(corpus.build(engine, config), "bytes").values())
        figures = signature_speeds(partitions, 1 if arguments.quick else 10)
        seconds, memory = job_seconds(root, config, workers)
        figures |= {"job_mb_s": size / 1e6 / seconds, "job_seconds": seconds, "peak_rss_mb": memory}
        if not arguments.quick:
            pairs = [(job_seconds(root, config, 1)[0], job_seconds(root, config, 2)[0]) for _ in range(5)]
            speedups = sorted(one / two for one, two in pairs)
            print(f"  one against two workers, five pairs of runs: {', '.join(f'{s:.2f}' for s in speedups)}")
            figures["two_worker_speedup"] = speedups[2]
        print(f"  job: {size / 1e6:.1f} MB in {seconds:.1f} s, {workers} workers")
    if "datatrove" in peers and arguments.datatrove_mb:
        figures |= against_datatrove(files, 5 if arguments.quick else arguments.datatrove_mb, workers)
    for name, value in figures.items():
        print(f"{name:28} {value:10.2f}")
    dedup_corpus.save(arguments.json, figures)


def against_datatrove(files: dict[str, Path], most_mb: float, workers: int) -> dict[str, float]:
    """Both on the same sources, smallest first, up to about `most_mb` of text."""
    taken: dict[str, Path] = {}
    for name, path in files.items():
        if not taken or sum(f.stat().st_size for f in [*taken.values(), path]) * 5 <= most_mb * 1e6:
            taken[name] = path
    with tempfile.TemporaryDirectory() as root:
        config = dedup_corpus.configuration(root, taken, workers)
        with Engine(root, workers) as engine:
            partitions = corpus.partitions(engine, config)
            size = sum(corpus.totals(corpus.build(engine, config), "bytes").values()) / 1e6
        ours = job_seconds(root, config, workers)[0]
        theirs = datatrove_seconds(partitions, workers)
    print(f"  {len(taken)} sources, {size:.1f} MB: ours {ours:.1f} s, datatrove {theirs:.1f} s, {workers} workers")
    return {"datatrove_mb": size, "datatrove_mb_s": size / theirs, "vs_datatrove": theirs / ours}


if __name__ == "__main__":
    main()
