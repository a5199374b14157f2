"""Small made-up corpus partitions for the mixer's tests."""

import itertools
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from dataprep.storage import binary_array
from mixer.config import MixConfig
from mixer.draw import draw
from mixer.exclude import load_exclude
from mixer.inventory import add_inventories, take_inventory
from mixer.plan import Plan
from mixer.planner import make_plan

NOBODY = load_exclude(None)


class Partition(NamedTuple):
    documents: pa.Table
    dedup: pa.Table
    quality: pa.Table
    tokens: pa.Table


def partition(
    file: int, lengths: list[int] | np.ndarray, source: str = "web", seed: int = 0, duplicates: float = 0.2
) -> Partition:
    """Documents whose token i is (doc's record + i) % 251, so that every token tells where it came from."""
    n = len(lengths)
    rng = np.random.default_rng([seed, file])
    doc = (np.uint64(file) << np.uint64(40)) | np.arange(n, dtype=np.uint64)
    ids = [(record + np.arange(length)) % 251 for record, length in enumerate(lengths)]
    flat = np.concatenate([np.zeros(0, np.uint16), *ids]).astype("<u2")
    offsets = 2 * np.concatenate([[0], np.cumsum(lengths)])
    return Partition(
        pa.table(
            {
                "doc": doc,
                "source": pa.array([source] * n, pa.string()).dictionary_encode(),
                "id": pa.array([f"{source}-{file}-{i}" for i in range(n)], pa.string()),
                "content_hash": pa.array([rng.bytes(16) for _ in range(n)], pa.binary(16)),
            }
        ),
        pa.table({"doc": doc, "keep": rng.random(n) >= duplicates, "cluster": doc}),
        pa.table({"doc": doc, "tier": pa.array(rng.choice(["low", "medium", "high"], n), pa.string())}),
        pa.table(
            {"doc": doc, "n_tokens": pa.array(lengths, pa.uint32()), "ids": binary_array(flat.view(np.uint8), offsets)}
        ),
    )


def corpus(n: int = 400, files: int = 4, seed: int = 0, middle: float = 60) -> list[Partition]:
    """Partitions of two sources in turn, with log-normal lengths."""
    rng = np.random.default_rng(seed)
    names = itertools.cycle(["web", "books"])
    sizes = [np.maximum(1, rng.lognormal(np.log(middle), 1.0, n).astype(np.int64)) for _ in range(files)]
    return [partition(f, sizes[f], next(names), seed) for f in range(files)]


def config(*stages: dict[str, Any], **rest: Any) -> MixConfig:
    """Stages of a test; the classes begin at 50 and 150 tokens."""
    defaults = {"thresholds": {"medium": 50, "long": 150}, "shard_tokens": 20_000}
    named = [{"name": f"s{i}", "context": 256} | stage for i, stage in enumerate(stages)]
    return MixConfig(**defaults | {"stages": named} | rest)


def planned(parts: list[Partition], mix: MixConfig) -> tuple[list[pa.Table], Plan]:
    """(inventory tables, plan)."""
    taken = [take_inventory(*part, mix, NOBODY) for part in parts]
    return [table for table, _ in taken], make_plan(add_inventories(sums for _, sums in taken), mix)


def drawn(parts: list[Partition], inventories: list[pa.Table], plan: Plan, stage: str) -> pa.Table:
    return pa.concat_tables([draw(i, p.tokens, plan, stage) for i, p in zip(inventories, parts, strict=True)])
