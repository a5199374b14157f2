"""The ablation's data: a corpus through the jobs once, then for every arm and seed what it may draw, and its shards."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dataprep.storage import Attempt, fingerprint, read_table
from jobs import corpus, dedup, mix, quality, tokens
from jobs.config import Config
from jobs.engine import Engine, Step, Task
from mixer.config import CLASSES, HELD_OUT, TIERS
from mixer.hashing import hashed
from mixer.reader import ShardLog

VERSION = 1
RELATED = 0.5  # Jaccard similarity from which documents stay on one side of the held-out split
LARGEST = 0.05  # of a source's pool: no arm has larger documents, or a single one would be a source's whole pool


def load(config: Config, related_root: str) -> tuple[dict[str, Any], pa.Table]:
    """Run the jobs before the plan, once for all arms, and deduplication once more at RELATED in a root of its own.

    Returns what an engine remembers of the jobs, and all documents: partition (its number), source, doc, n_tokens,
    kept (by deduplication), cluster (its keeper), clean (kept and not in the lowest tier), related: one number for
    all that must stay on one side of the held-out split.
    """
    with Engine(config.root, config.workers) as engine:
        built = [build(engine, config) for build in (corpus.partitions, dedup.build, quality.build, tokens.build)]
        results = engine.results
    loose = config.dedup.model_copy(update={"threshold": RELATED, "bands": None, "rows": None})
    with Engine(related_root, config.workers) as engine:
        built.append(dedup.build(engine, config.model_copy(update={"root": related_root, "dedup": loose})))
    parts = []
    for number, (partition, verdict, score, encoded, loose_verdict) in enumerate(zip(*built, strict=True)):
        verdicts = read_table(verdict.path("dedup"))
        tier = read_table(score.path("quality"), ["tier"])["tier"].cast(pa.string())
        columns = {
            "partition": np.full(len(verdicts), number),
            "source": [partition.source] * len(verdicts),
            "doc": verdicts["doc"],
            "n_tokens": read_table(encoded.path("tokens"), ["n_tokens"])["n_tokens"].cast(pa.int64()),
            "kept": verdicts["keep"],
            "cluster": verdicts["cluster"],
            "clean": pc.and_(verdicts["keep"], pc.not_equal(tier, "low")),
            "loose": read_table(loose_verdict.path("dedup"), ["cluster"])["cluster"],
        }
        parts.append(pa.table(columns))
    documents = pa.concat_tables(parts)
    doc, *others = (documents[name].to_numpy() for name in ("doc", "cluster", "loose"))
    return results, documents.append_column("related", pa.array(components(doc, others)))


def components(doc: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """For each document (sorted) a number that it shares with its `others[i]`, documents too, and so on with theirs."""
    here = np.tile(np.arange(len(doc)), len(others))
    there = np.searchsorted(doc, np.concatenate(others))
    graph = coo_array((np.ones(len(here), bool), (here, there)), shape=(len(doc), len(doc)))
    number = connected_components(graph, directed=False)[1]
    return doc[np.unique(number, return_index=True)[1]][number]


def may_be_drawn(documents: pa.Table, arm: str, config: Config, pool_tokens: float) -> np.ndarray:
    """bool by document: the arm's part of the pool, and the held-out documents, clean ones, the same for every arm.

    The pool: from every source groups of related documents, by hash, until their clean text, beside what is held out,
    has an equal part of `pool_tokens`. A group comes with all its duplicates or not at all: so a small pool is as
    repetitive as the corpus.
    """
    columns = ("source", "n_tokens", "kept", "clean", "related")
    source, n_tokens, kept, clean, related = (documents[name].to_numpy() for name in columns)
    seed, share = config.mix.seed, config.mix.held_out.fraction
    held_out = hashed(seed, HELD_OUT, related) < np.uint64(int(share * 2.0**64))  # as the planner has it
    place = hashed(seed, "pool", related)
    wanted = pool_tokens / len(set(source)) / (1 - share)
    fits = n_tokens <= max(LARGEST * wanted, config.mix.held_out.context or 0)
    pool = np.zeros(len(fits), bool)
    for name in set(source):
        (here,) = np.nonzero((source == name) & fits)
        here = here[np.argsort(place[here], kind="stable")]
        enough = np.searchsorted(np.cumsum((n_tokens * clean)[here]), wanted)
        pool[here] = place[here] <= place[here][min(int(enough), len(here) - 1)]
    train = {"raw": np.ones(len(fits), bool), "dedup": kept}.get(arm, clean)
    return pool & np.where(held_out, clean, train)


def pack(
    results: dict[str, Any], documents: pa.Table, arm: str, config: Config, pool_tokens: float
) -> dict[str, float]:
    """Plan and pack under the arm's own root, with verdicts that keep what it may draw; returns what it reads."""
    keep = pa.array(may_be_drawn(documents, arm, config, pool_tokens))
    verdicts = pa.table({"doc": documents["doc"], "keep": keep, "cluster": documents["related"]})
    with Engine(config.root, 0) as engine:
        engine.results |= results
        tasks = []
        for number, partition in enumerate(corpus.partitions(engine, config)):
            part = verdicts.filter(pc.equal(documents["partition"], number))
            content = fingerprint([part["keep"].to_pylist(), part["cluster"].to_pylist()])
            tasks.append(Task(partition.key, {"verdicts": content}, (part,)))
        engine.results["jobs.dedup.build"] = engine.map(Step("arm", VERSION), write_verdicts, tasks)
        prepared = mix.prepare(engine, config)
        mix.pack_all(engine, prepared)
        return what_is_read(documents, [ShardLog(stage.directory) for stage in prepared.stages[1:]])


def write_verdicts(out: Attempt, verdicts: pa.Table) -> dict[str, int]:
    out.table("dedup", verdicts)
    return {"documents": len(verdicts)}


def what_is_read(documents: pa.Table, logs: list[ShardLog]) -> dict[str, float]:
    """Tokens, documents, and parts of the tokens: in repeats, in (near) duplicates, in unclean documents and so on."""
    doc, n_tokens, cluster, clean = (documents[name].to_numpy() for name in ("doc", "n_tokens", "cluster", "clean"))
    segments = np.concatenate([log.read(0, log.wait(1 << 62)).segments for log in logs])
    row, length = np.searchsorted(doc, segments["doc"]), segments["length"].astype(np.int64)
    tokens_of = np.bincount(row, length, len(doc))
    once = np.minimum(tokens_of, n_tokens)
    largest = np.zeros(len(doc))
    keeper = np.searchsorted(doc, cluster)
    np.maximum.at(largest, keeper, once)
    total = float(length.sum())
    verdict = clean[keeper]  # a duplicate is as clean as what it is a duplicate of
    return {
        "tokens": total,
        "documents": int((tokens_of > 0).sum()),
        "repeats": (total - once.sum()) / total,
        "duplicates": (once.sum() - largest.sum()) / total,
        "unclean": float(tokens_of[~verdict].sum()) / total,
        "high tier": float(length[segments["tier"] == TIERS.index("high")].sum()) / total,
        "long documents": float(length[segments["length_class"] == CLASSES.index("long")].sum()) / total,
    }
