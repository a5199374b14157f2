"""Made-up inventories and curricula for the planner's tests."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from mixer.config import CLASSES, TIERS, MixConfig
from mixer.inventory import add_inventories
from mixer.problem import Problem, build
from tests.mixer.corpus import config


def inventory(cells, stages=1):
    """cells: (source, tier, class, tokens[, held out]), one document each."""
    rows = [
        {
            "source": source, "tier": tier, "length_class": length_class, "held_out": bool(held_out), "documents": 1,
            "tokens": tokens, "usable": [tokens] * stages, "exact": False, "pieces": [[0], [tokens]],
        }
        for source, tier, length_class, tokens, *held_out in cells
    ]  # fmt: skip
    return add_inventories([{"removed": {}, "cells": rows}])


# From 1 to 10^12, of all magnitudes, in few bits: a failing example is made small in seconds.
AMOUNTS = st.builds(lambda n, zeros: n * 10**zeros + zeros, st.integers(1, 1000), st.sampled_from([0, 3, 6, 9]))


@st.composite
def recipes(draw):
    cell = st.tuples(
        st.sampled_from(["a", "b", "c"]), st.sampled_from(["low", "medium", "high"]),
        st.sampled_from(["short", "medium", "long"]), AMOUNTS,
    )  # fmt: skip
    cells = draw(st.lists(cell, min_size=1, max_size=10))
    part = st.integers(0, 10)
    names = sorted({c[0] for c in cells})
    weights = (
        st.tuples(*[st.integers(0, 4)] * len(names))
        .filter(any)
        .map(lambda w: {name: x / sum(w) for name, x in zip(names, w, strict=True)})
    )
    stages = []
    for _ in range(draw(st.integers(1, 3))):
        shares = draw(st.none() | st.tuples(part, part, part).filter(any))
        classes = ("short", "medium", "long")
        stages.append(
            {
                "tokens": draw(AMOUNTS),
                "shares": shares and {n: s / sum(shares) for n, s in zip(classes, shares, strict=True)},
                "source_weights": draw(st.none() | weights),
            }
        )
    return inventory(cells, len(stages)), config(*stages)


def problem_of(sums: dict[str, Any], mix: MixConfig) -> Problem:
    cells = [cell for cell in sums["cells"] if not cell["held_out"]]
    return build(cells, sorted({cell["source"] for cell in sums["cells"]}), mix)


def full_size(tokens: float, sources: int = 200, stages: int = 4, seed: int = 0) -> dict[str, Any]:
    """An inventory of the paper's size: sources of log-normal size, each with its own tiers and classes."""
    rng = np.random.default_rng(seed)
    sizes = rng.lognormal(0, 1.5, sources)
    rows = []
    for j, size in enumerate(sizes / sizes.sum() * tokens):
        tiers, classes = rng.dirichlet([3, 5, 2]), rng.dirichlet([30, 3, 1])
        rows += [
            (f"source-{j:03d}", tier, length_class, int(size * t * c) + 1)
            for tier, t in zip(TIERS, tiers, strict=True)
            for length_class, c in zip(CLASSES, classes, strict=True)
        ]
    return inventory(rows, stages)
