"""The `mix:` section: length classes, tiers, the stages of the curriculum and what is held out."""

from collections import Counter
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TierName = Literal["low", "medium", "high"]
TIERS = get_args(TierName)
CLASSES = ("short", "medium", "long")
HELD_OUT = "held-out"  # the name of the held-out split among the stages
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


def _stage(name: str, context: int, rope_base: float, tokens: int, shares: dict[str, float] | None) -> dict[str, Any]:
    return {"name": name, "context": context, "rope_base": rope_base, "tokens": tokens, "shares": shares}


PRESETS: dict[str, dict[str, Any]] = {
    "minimax-01": {  # arXiv 2501.08313, table of the long-context extension
        "thresholds": {"medium": 32 << 10, "long": 128 << 10},
        "stages": [
            _stage("main", 8 << 10, 1e4, 11_400_000_000_000, None),
            _stage("128k", 128 << 10, 5e6, 300_000_000_000, {"short": 0.3, "medium": 0.7, "long": 0.0}),
            _stage("512k", 512 << 10, 1e7, 32_000_000_000, {"short": 0.35, "medium": 0.35, "long": 0.3}),
            _stage("1m", 1 << 20, 1e7, 26_000_000_000, {"short": 0.3, "medium": 0.3, "long": 0.4}),
        ],
    }
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Thresholds(Section):
    """Length classes of n tokens, for the whole curriculum: short < `medium` <= medium < `long` <= long."""

    medium: int = Field(default=32 << 10, ge=1, description="A document is short below this many tokens.")
    long: int = Field(
        default=128 << 10, ge=2, description="A document is long from this many tokens on; between, medium."
    )

    @model_validator(mode="after")
    def _in_order(self) -> "Thresholds":
        if self.medium >= self.long:
            raise ValueError(f"thresholds.medium is {self.medium}, thresholds.long {self.long}: medium must be smaller")
        return self


class Tier(Section):
    copies: float = Field(ge=0, allow_inf_nan=False, description="Up-sampling wanted, relative to the other tiers.")
    cap: int = Field(ge=1, le=65535, description="Most copies of one document over all stages.")


DEFAULT_TIERS: dict[TierName, Tier] = {
    "high": Tier(copies=4, cap=4),
    "medium": Tier(copies=1, cap=4),
    "low": Tier(copies=1, cap=2),
}


class Shares(Section):
    short: float = Field(default=0.0, ge=0, le=1, description="Part of the stage's tokens from short documents.")
    medium: float = Field(default=0.0, ge=0, le=1, description="Part of the stage's tokens from medium documents.")
    long: float = Field(default=0.0, ge=0, le=1, description="Part of the stage's tokens from long documents.")

    @model_validator(mode="after")
    def _sum(self) -> "Shares":
        total = self.short + self.medium + self.long
        if abs(total - 1) > 1e-6:
            raise ValueError(f"shares {self.short:g} + {self.medium:g} + {self.long:g} = {total:g}: they must sum to 1")
        return self


class Stage(Section):
    name: str = Field(pattern=NAME, description="Names the stage's directory: letters, digits, '.', '_' and '-'.")
    context: int = Field(ge=1, description="Tokens in one sequence.")
    rope_base: float = Field(
        default=10_000.0, gt=0, allow_inf_nan=False, description="RoPE base the trainer uses in this stage."
    )
    tokens: int = Field(ge=1, description="Tokens to draw for this stage.")
    shares: Shares | None = Field(
        default=None, description="Parts of short, medium and long documents; null: as they come."
    )
    source_weights: dict[str, float] | None = Field(
        default=None,
        description="Relative weight by source; 1 where none is given, 0 leaves the source out of the stage.",
    )
    long_documents: Literal["split", "truncate", "drop"] = Field(
        default="split", description="What to do with documents longer than the context."
    )

    @field_validator("source_weights")
    @classmethod
    def _not_negative(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        for source, weight in (weights or {}).items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"source_weights.{source} is {weight:g}: a weight must be 0 or more")
        return weights


class HeldOut(Section):
    fraction: float = Field(
        default=0.001, ge=0, lt=1, description="Part of the deduplication clusters never trained on."
    )
    tokens: int = Field(default=10_000_000, ge=0, description="Most held-out tokens to pack.")
    context: int | None = Field(
        default=None, ge=1, description="Tokens in a held-out sequence; null: the first stage's."
    )


class MixConfig(Section):
    """What is drawn, in which order and how often."""

    preset: Literal["minimax-01"] | None = Field(
        default=None, description="Thresholds and stages of a published recipe, where they are not given here."
    )
    thresholds: Thresholds = Field(default=Thresholds(), description="Where the length classes begin.")
    tiers: dict[TierName, Tier] = Field(default=DEFAULT_TIERS, description="Copies and cap by quality tier.")
    stages: list[Stage] = Field(min_length=1, description="The curriculum, in order.")
    held_out: HeldOut = Field(default=HeldOut(), description="The split that no stage draws from.")
    shard_tokens: int = Field(default=64_000_000, ge=1, description="Tokens per shard, about.")
    compression: Literal["zstd", "none"] = Field(
        default="zstd", description="Of the shards; none: twice the bytes, read several times as fast."
    )
    exclude: str | None = Field(
        default=None,
        description="File of documents to take down, one per line: owner's id, content hash (hex) or doc:NUMBER.",
    )
    seed: int = Field(default=0, description="Seed of every draw.")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("preset") in PRESETS:
            return PRESETS[value["preset"]] | value
        return value

    @field_validator("tiers", mode="before")
    @classmethod
    def _tier_defaults(cls, value: Any) -> Any:
        """A tier, or half of one, that is not given keeps its default."""
        if not isinstance(value, dict):
            return value
        merged: dict[str, Any] = {name: tier.model_dump() for name, tier in DEFAULT_TIERS.items()}
        for name, tier in value.items():
            if name not in merged:
                raise ValueError(f"tiers.{name}: no such tier; the tiers are {', '.join(TIERS)}")
            merged[name] = merged[name] | tier if isinstance(tier, dict) else tier
        return merged

    @model_validator(mode="after")
    def _stages_possible(self) -> "MixConfig":
        names = Counter(stage.name.lower() for stage in self.stages)
        for i, stage in enumerate(self.stages):
            if names[stage.name.lower()] > 1 or stage.name == HELD_OUT:
                raise ValueError(f"stages.{i}.name is {stage.name!r}, which is taken: give every stage its own name")
            if self.shard_tokens < stage.context:
                raise ValueError(
                    f"shard_tokens is {self.shard_tokens}, less than one sequence of stages.{i}.context "
                    f"({stage.context}): raise it to many times the context"
                )
            if stage.shares and stage.shares.long > 0 and stage.context < self.thresholds.long:
                raise ValueError(
                    f"stages.{i}.shares.long is {stage.shares.long:g}, but no document that is long (from "
                    f"{self.thresholds.long} tokens) fits into the context of {stage.context}: set the share to 0, "
                    f"raise stages.{i}.context or lower thresholds.long"
                )
        return self
