"""What deduplication can be told: the `dedup:` section of a pipeline's configuration."""

import functools
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DedupConfig(BaseModel):
    """Exact copies and near duplicates: how they are found, and which document of a pair stays."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    near: bool = Field(True, description="Find near duplicates too; false: exact copies only.")
    scope: Literal["across", "within"] = Field(
        "across", description="across: duplicates in all sources together; within: in each source by itself."
    )
    against: int = Field(
        0,
        ge=0,
        le=1 << 24,
        description="Compare new files with old ones: documents of input files numbered below this (`file` in "
        "manifest.jsonl) come first in keeper order, so what a run over them alone keeps stays; 0: all alike.",
    )
    threshold: float = Field(
        0.8, gt=0, le=1, description="Jaccard similarity of word shingles from which a pair is a near duplicate."
    )
    shingle: int = Field(5, ge=1, le=64, description="Words per shingle; shorter documents are compared exactly only.")
    permutations: int = Field(112, ge=1, le=4096, description="Most MinHash permutations to compute per document.")
    bands: int | None = Field(14, ge=1, description="LSH bands; null (with rows): chosen for the threshold.")
    rows: int | None = Field(8, ge=1, description="Permutations per band; null (with bands): chosen for the threshold.")
    keeper: tuple[Literal["source", "length", "oldest"], ...] = Field(
        ("source", "length", "oldest"),
        description="Which of two duplicates stays: rules in order of weight. source: as in source_priority; "
        "length: the longer in bytes; oldest: the one that came first into the corpus.",
    )
    source_priority: tuple[str, ...] = Field(
        (), max_length=65535, description="Sources, best first; those not listed come after all that are."
    )
    max_source_loss: float = Field(
        0.5, ge=0, le=1, description="Stop if near duplicates take a larger share of any source's documents or bytes."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the MinHash permutations.")

    @model_validator(mode="after")
    def _check(self) -> "DedupConfig":
        if (self.bands is None) != (self.rows is None):
            raise ValueError(f"bands is {self.bands} and rows is {self.rows}: give both numbers or set both to null")
        if self.bands and self.rows and self.bands * self.rows > self.permutations:
            raise ValueError(
                f"bands * rows is {self.bands} * {self.rows} = {self.bands * self.rows}, more than "
                f"permutations ({self.permutations}): raise permutations or take fewer bands or rows"
            )
        for name, values in (("keeper", self.keeper), ("source_priority", self.source_priority)):
            if repeated := sorted({v for v in values if values.count(v) > 1}):
                raise ValueError(f"{name} names {', '.join(repeated)} more than once: name each once")
        if "oldest" in self.keeper[:-1]:
            raise ValueError(f"keeper is {list(self.keeper)}: oldest leaves no ties, so put it last")
        return self

    @property
    def layout(self) -> tuple[int, int]:
        """(bands, rows), chosen for the threshold where the configuration leaves them open."""
        if self.bands and self.rows:
            return self.bands, self.rows
        return _optimal_layout(self.threshold, self.permutations)


@functools.cache
def _optimal_layout(threshold: float, permutations: int) -> tuple[int, int]:
    """The (bands, rows) with the least false positives and negatives around the threshold."""
    from datasketch import MinHashLSH  # imports scipy: only where it is needed

    chosen = MinHashLSH(threshold=threshold, num_perm=permutations)
    return chosen.b, chosen.r
