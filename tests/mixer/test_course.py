"""Packed stages hold what was planned: class shares over all of it, source weights in every tenth, through windows."""

import numpy as np
import pyarrow.compute as pc
import pytest

from mixer.config import CLASSES
from mixer.pack import pack_window
from mixer.plan import Plan, StagePlan
from tests.mixer.corpus import config, drawn, partition, planned

SOURCES = ["books", "code", "forum", "qa", "web"]
STAGES = (
    {"tokens": 2_000_000, "source_weights": {"books": 0.1, "code": 0.2, "forum": 0.1, "qa": 0.0, "web": 0.6}},
    {
        "tokens": 2_000_000, "context": 512, "shares": {"short": 0.3, "medium": 0.3, "long": 0.4}, "transition": 0.5,
        "source_weights": {"books": 0.4, "code": 0.3, "forum": 0.2, "web": 0.1},
        "blend": {"sources": {"qa": 0.1}, "last": 0.2},
    },
)  # fmt: skip


def many_documents(seed: int = 0):
    rng = np.random.default_rng(seed)
    sizes = [np.maximum(1, rng.lognormal(np.log(60), 0.9, 4000).astype(np.int64)) for _ in range(10)]
    return [partition(f, lengths, SOURCES[f % 5], seed, duplicates=0) for f, lengths in enumerate(sizes)]


def pack(parts, inventories, plan: Plan, stage: StagePlan):
    """(context, segments of the whole stage in training order, numbered on from window to window)."""
    items = drawn(parts, inventories, plan, stage.name)
    info = plan.stage_info(stage.name, 251, 0, tokenizer="", plan="")
    rows, segments = 0, []
    for window in range(stage.shards):
        packed = pack_window(items.filter(pc.equal(items["window"], window)), info, stage.long_documents, plan.seed)
        packed.segments["sequence"] += rows
        rows += len(packed.tokens)
        segments.append(packed.segments)
    return rows, np.concatenate(segments)


def density_between(knots, begin: float, end: float) -> float:
    """The integral of a piecewise linear density, by adding many small steps."""
    x, d = np.array(knots).T
    ends = np.searchsorted(x, fine := (np.arange(100_000) + 0.5) / 100_000, side="right").clip(1, len(x) - 1)
    inside = d[ends - 1] + (d[ends] - d[ends - 1]) * (fine - x[ends - 1]) / np.maximum(x[ends] - x[ends - 1], 1e-12)
    return float(inside[(fine >= begin) & (fine < end)].sum()) / 100_000


@pytest.mark.parametrize("exact", [4096, 50])
def test_class_shares_within_half_a_point_and_sources_within_one_in_every_tenth(monkeypatch, exact):
    """Cells that list their items, and cells of buckets."""
    monkeypatch.setattr("mixer.inventory.EXACT", exact)
    parts = many_documents()
    inventories, plan = planned(parts, config(*STAGES, shard_tokens=100_000))
    for stage in plan.stages:
        rows, segments = pack(parts, inventories, plan, stage)
        of_class = np.bincount(segments["length_class"], segments["length"], 3) / segments["length"].sum()
        for share, name in zip(of_class, CLASSES, strict=True):
            assert share == pytest.approx(stage.classes[name] / stage.tokens, abs=0.005)
        for tenth in range(10):
            here = segments[segments["sequence"] * 10 // rows == tenth]
            packed = np.bincount(here["source"], here["length"], len(plan.sources)) / here["length"].sum()
            wanted = {}
            for name in plan.sources:
                tokens = sum(c.planned for c in stage.cells if c.source == name)
                knots = stage.densities.get(name, [(0.0, 1.0), (1.0, 1.0)])
                wanted[name] = tokens * density_between(knots, tenth / 10, tenth / 10 + 0.1)
            for name, share in zip(plan.sources, packed, strict=True):
                assert share == pytest.approx(wanted[name] / sum(wanted.values()), abs=0.01)
