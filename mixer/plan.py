"""The plan: for every stage and cell (source x tier x length class), how many tokens and copies, and why."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import ConfigDict, TypeAdapter

from dataprep.storage import UserError, fingerprint
from mixer.config import CLASSES, TIERS
from mixer.shards import StageInfo


@dataclass(frozen=True)
class Cell:
    source: str
    tier: str
    length_class: str

    @property
    def name(self) -> str:
        return f"{self.source}/{self.tier}/{self.length_class}"


@dataclass(frozen=True)
class CellPlan(Cell):
    """What one stage draws from one cell.

    available: the cell's tokens, without duplicates, excluded and held-out documents. usable: what of them the stage's
    policy for documents over its context leaves. copies_before, copies_after: of each document, on average, before
    and after this stage; one with its place u in [0, 1) is drawn floor(after + u) - floor(before + u) times.
    """

    available: int
    usable: int
    planned: int
    copies_before: float
    copies_after: float
    why: str


@dataclass(frozen=True)
class Limit(Cell):
    """A cell whose cap binds. tokens: drawable over all stages. price: nats that the plan's distance from what was
    asked (`mixer.fit`) would fall by for one token more.
    """

    tokens: int
    price: float


@dataclass(frozen=True)
class StagePlan:
    """classes: planned tokens by length class. shards: windows the drawn documents are dealt to, one shard each.

    asked: share of the stage's tokens by source; empty: as they come. densities: by source, knots (x, d) of the
    piecewise linear density of its tokens over the stage: x in [0, 1], not decreasing (two knots with one x make a
    step), d >= 0, integral 1; a source that is not in it is uniform.
    class_prices: nats that the distance from what was asked would rise by for one token more of a class.
    """

    name: str
    index: int
    context: int
    rope_base: float
    tokens: int
    long_documents: str
    shards: int
    classes: dict[str, int]
    cells: tuple[CellPlan, ...]
    asked: dict[str, float] = field(default_factory=dict)
    densities: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    class_prices: dict[str, float] = field(default_factory=dict)

    def by(self, column: str) -> dict[str, int]:
        """Planned tokens by a column of the cells."""
        found: dict[str, int] = {}
        for cell in self.cells:
            found[getattr(cell, column)] = found.get(getattr(cell, column), 0) + cell.planned
        return found


@dataclass(frozen=True)
class Plan:
    """stages: in the order of training. held_out: the split that none of them draws from.

    config: `MixConfig.recipe`. places: where each cell is cut (PLACES of mixer/places.py), a row for each of the plan's
    cells.
    """

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)

    config: dict[str, Any]
    sources: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    held_out: StagePlan
    limits: tuple[Limit, ...]
    removed: dict[str, dict[str, int]]
    places: pa.Table

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def tiers(self) -> dict[str, dict[str, Any]]:
        """By tier, `copies` asked for and `cap`."""
        return self.config["tiers"]

    def copy_price(self, limit: Limit) -> float:
        """Nats that the plan would come nearer to what was asked if the cell's documents could be drawn once more."""
        return limit.price * limit.tokens / self.tiers[limit.tier]["cap"]

    def stage(self, name: str) -> StagePlan:
        """The stage of this name, the held-out split under "held-out" too; raises UserError for another name."""
        stages = {stage.name: stage for stage in (*self.stages, self.held_out)}
        if name not in stages:
            raise UserError(f"the plan has no stage {name!r}; its stages are {', '.join(stages)}")
        return stages[name]

    def to_json(self) -> dict[str, Any]:
        return {
            "config": self.config,
            "sources": self.sources,
            "removed": self.removed,
            "stages": [asdict(stage) for stage in self.stages],
            "held_out": asdict(self.held_out),
            "limits": [asdict(limit) for limit in self.limits],
            "places": _digests(self.places),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any], places: pa.Table | None) -> "Plan":
        """Raises UserError where the table of places is another plan's; None: a plan to look at, not to draw by."""
        if places is not None and _digests(places) != value["places"]:
            raise UserError("the plan's table of places is damaged or belongs to another plan; plan the mixture again")
        return TypeAdapter(cls).validate_python(value | {"places": pa.table({}) if places is None else places})

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.to_json())

    def stage_info(self, name: str, vocab_size: int, eos: int, **rest: Any) -> StageInfo:
        """What stage.json says of a stage. rest: the fingerprints `tokenizer` and `plan`, `compression`."""
        stage = self.stage(name)
        same: dict[str, Any] = {
            key: getattr(stage, key) for key in ("index", "context", "rope_base", "tokens", "shards")
        }
        dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        names: dict[str, Any] = {"sources": self.sources, "tiers": TIERS, "classes": CLASSES}
        return StageInfo(stage=name, vocab_size=vocab_size, eos=eos, token_dtype=dtype, **same, **names, **rest)


def _digests(places: pa.Table) -> dict[str, Any]:
    """Of the documents there are to draw (their hashes and sizes), and of the cuts before and after each stage."""
    held_out = places["held_out"].to_numpy()
    values = {name: places[name].combine_chunks() for name in ("knots", "cumulative", "copies")}
    cuts = values["copies"].filter(pa.array(~held_out)).flatten().to_numpy().reshape((~held_out).sum(), -1)
    last = values["copies"].filter(pa.array(held_out)).flatten().to_numpy()
    documents = [values[name].flatten().to_numpy() for name in ("knots", "cumulative")]
    return {"documents": _digest(*documents), "cuts": [_digest(cut) for cut in cuts.T], "held_out": _digest(last)}


def _digest(*arrays: np.ndarray) -> str:
    return xxhash.xxh3_64_hexdigest(b"".join(array.tobytes() for array in arrays))
