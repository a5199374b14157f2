"""The ablation's data: a corpus through the jobs once, then for every arm and seed what it may draw, and its shards."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
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


@dataclass(frozen=True)
class Corpus:
    """All documents, in the partitions' order, and what the jobs found.

    results: what an engine remembers of the jobs up to the tokens; sizes: documents of each partition. Arrays of one
    value per document: doc, source (a name), n_tokens, kept (by deduplication), cluster (its keeper), clean (kept and
    not in the lowest tier), related: one number for all that must stay on one side of the held-out split.
    """

    results: dict[str, Any]
    sizes: list[int]
    doc: np.ndarray
    source: np.ndarray
    n_tokens: np.ndarray
    kept: np.ndarray
    cluster: np.ndarray
    clean: np.ndarray
    related: np.ndarray


def load(config: Config, related_root: str) -> Corpus:
    """Run the jobs before the plan, once for all arms, and deduplication once more at RELATED in a root of its own."""
    with Engine(config.root, config.workers) as engine:
        built = [build(engine, config) for build in (corpus.partitions, dedup.build, quality.build, tokens.build)]
        results = engine.results
    loose = config.dedup.model_copy(update={"threshold": RELATED, "bands": None, "rows": None})
    with Engine(related_root, config.workers) as engine:
        built.append(dedup.build(engine, config.model_copy(update={"root": related_root, "dedup": loose})))
    parts = []
    for partition, verdict, score, encoded, loose_verdict in zip(*built, strict=True):
        table = read_table(verdict.path("dedup"), ["doc", "keep", "cluster"])
        table = table.append_column("source", pa.array([partition.source] * len(table)))
        table = table.append_column("tier", read_table(score.path("quality"), ["tier"])["tier"].cast(pa.string()))
        table = table.append_column("n_tokens", read_table(encoded.path("tokens"), ["n_tokens"])["n_tokens"])
        parts.append(table.append_column("loose", read_table(loose_verdict.path("dedup"), ["cluster"])["cluster"]))
    table = pa.concat_tables(parts)
    doc, kept, cluster, source, tier, n_tokens, loose_cluster = (c.to_numpy() for c in table.columns)
    related = components(doc, [cluster, loose_cluster])
    return Corpus(
        results,
        [len(p) for p in parts],
        doc,
        source,
        n_tokens.astype(np.int64),
        kept,
        cluster,
        kept & (tier != "low"),
        related,
    )


def components(doc: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """For each document (sorted) a number that it shares with its `others[i]`, documents too, and so on with theirs."""
    here = np.tile(np.arange(len(doc)), len(others))
    there = np.searchsorted(doc, np.concatenate(others))
    graph = coo_array((np.ones(len(here), bool), (here, there)), shape=(len(doc), len(doc)))
    number = connected_components(graph, directed=False)[1]
    return doc[np.unique(number, return_index=True)[1]][number]


def may_be_drawn(documents: Corpus, arm: str, config: Config, pool_tokens: float) -> np.ndarray:
    """bool by document: the arm's part of the pool, and the held-out documents, clean ones, the same for every arm.

    The pool: from every source groups of related documents, by hash, until their clean text, beside what is held out,
    has an equal part of `pool_tokens`. A group comes with all its duplicates or not at all: so a small pool is as
    repetitive as the corpus.
    """
    seed, share = config.mix.seed, config.mix.held_out.fraction
    held_out = hashed(seed, HELD_OUT, documents.related) < np.uint64(int(share * 2.0**64))  # as the planner has it
    place = hashed(seed, "pool", documents.related)
    sources = np.unique(documents.source)
    wanted = pool_tokens / len(sources) / (1 - share)
    fits = documents.n_tokens <= max(LARGEST * wanted, config.mix.held_out.context or 0)
    pool = np.zeros(len(fits), bool)
    for source in sources:
        (here,) = np.nonzero((documents.source == source) & fits)
        here = here[np.argsort(place[here], kind="stable")]
        enough = np.searchsorted(np.cumsum((documents.n_tokens * documents.clean)[here]), wanted)
        pool[here] = place[here] <= place[here][min(int(enough), len(here) - 1)]
    train = {"raw": np.ones(len(fits), bool), "dedup": documents.kept}.get(arm, documents.clean)
    return pool & np.where(held_out, documents.clean, train)


def pack(documents: Corpus, arm: str, config: Config, pool_tokens: float) -> dict[str, float]:
    """Plan and pack under the arm's own root, with verdicts that keep what it may draw; returns what it reads."""
    verdicts = {"doc": documents.doc, "keep": may_be_drawn(documents, arm, config, pool_tokens)}
    table = pa.table(verdicts | {"cluster": documents.related})
    with Engine(config.root, 0) as engine:
        engine.results |= documents.results
        tasks, start = [], 0
        for partition, size in zip(corpus.partitions(engine, config), documents.sizes, strict=True):
            part, start = table.slice(start, size), start + size
            content = fingerprint([part["keep"].to_pylist(), part["cluster"].to_pylist()])
            tasks.append(Task(partition.key, {"verdicts": content}, (part,)))
        engine.results["jobs.dedup.build"] = engine.map(Step("arm", VERSION), write_verdicts, tasks)
        prepared = mix.prepare(engine, config)
        mix.pack_all(engine, prepared)
        return what_is_read(documents, [ShardLog(stage.directory) for stage in prepared.stages[1:]])


def write_verdicts(out: Attempt, verdicts: pa.Table) -> dict[str, int]:
    out.table("dedup", verdicts)
    return {"documents": len(verdicts)}


def what_is_read(documents: Corpus, logs: list[ShardLog]) -> dict[str, float]:
    """Tokens, documents, and parts of the tokens: in repeats, in (near) duplicates, in unclean documents and so on."""
    segments = np.concatenate([log.read(0, log.wait(1 << 62)).segments for log in logs])
    row, length = np.searchsorted(documents.doc, segments["doc"]), segments["length"].astype(np.int64)
    tokens_of = np.bincount(row, length, len(documents.doc))
    once = np.minimum(tokens_of, documents.n_tokens)
    largest = np.zeros(len(documents.doc))
    cluster = np.searchsorted(documents.doc, documents.cluster)
    np.maximum.at(largest, cluster, once)
    total = float(length.sum())
    verdict = documents.clean[cluster]  # a duplicate is as clean as what it is a duplicate of
    return {
        "tokens": total,
        "documents": int((tokens_of > 0).sum()),
        "repeats": (total - once.sum()) / total,
        "duplicates": (once.sum() - largest.sum()) / total,
        "unclean": float(tokens_of[~verdict].sum()) / total,
        "high tier": float(length[segments["tier"] == TIERS.index("high")].sum()) / total,
        "long documents": float(length[segments["length_class"] == CLASSES.index("long")].sum()) / total,
    }
