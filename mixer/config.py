"""The `mix:` section: length classes, tiers, the stages of the curriculum and what is held out."""

from collections import Counter
from math import isfinite
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

TierName = Literal["low", "medium", "high"]
TIERS = get_args(TierName)
CLASSES = ("short", "medium", "long")
HELD_OUT = "held-out"  # the name of the held-out split among the stages
LONGEST = 1 << 27  # tokens in a sequence: packing holds arrays of that length
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Recipe(NamedTuple):
    """A published curriculum. stages: (name, context, RoPE base, tokens, shares)."""

    thresholds: tuple[int, int]
    stages: tuple[tuple[str, int, float, int, tuple[float, float, float] | None], ...]
    transition: float
    blend: tuple[float, float]  # share of long-context QA, in this last part of each stage after the first


PRESETS = {
    "minimax-text-01": Recipe(  # arXiv 2501.08313, table of the long-context extension; transition: not stated
        (32 << 10, 128 << 10),
        (
            ("main", 8 << 10, 1e4, 11_400_000_000_000, None),
            ("context-128k", 128 << 10, 5e6, 300_000_000_000, (0.30, 0.70, 0.0)),
            ("context-512k", 512 << 10, 1e7, 32_000_000_000, (0.35, 0.35, 0.30)),
            ("context-1m", 1 << 20, 1e7, 26_000_000_000, (0.30, 0.30, 0.40)),
        ),
        transition=0.1,
        blend=(0.1, 0.2),
    )
}
PRESET_KEYS = {"preset", "scale", "context_scale", "long_qa"}


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
    """`copies` is asked for and met as nearly as targets and caps allow; `cap` holds for every document."""

    copies: float = Field(
        ge=0, allow_inf_nan=False, description="Copies asked for of each document, in total over all stages."
    )
    cap: int = Field(ge=1, le=65535, description="Most copies of one document over all stages.")


# Caps of high and low: MiniMax-01; of medium: about four passes over ordinary text are nearly free (arXiv 2305.16264).
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


class Blend(Section):
    sources: dict[str, float] = Field(
        min_length=1, description="Share of each of these sources in the last part of the stage."
    )
    last: float = Field(default=0.2, gt=0, le=1, description="The part of the stage, at its end, that is blended.")

    @model_validator(mode="after")
    def _shares(self) -> "Blend":
        if (total := _shares("blend.sources", self.sources)) == 0:
            raise ValueError(f"blend.sources sum to {total:g}: give them a share above 0, or leave the blend out")
        return self


class Stage(Section):
    name: str = Field(
        pattern=NAME, max_length=100, description="Names the stage's directory: letters, digits, '.', '_' and '-'."
    )
    context: int = Field(ge=1, le=LONGEST, description="Tokens in one sequence.")
    rope_base: float = Field(
        default=10_000.0, gt=0, allow_inf_nan=False, description="RoPE base the trainer uses in this stage."
    )
    tokens: int = Field(ge=1, le=10**18, description="Tokens to draw for this stage.")
    shares: Shares | None = Field(
        default=None, description="Parts of short, medium and long documents; null: as they come."
    )
    source_weights: dict[str, float] | None = Field(
        default=None,
        description="Share asked for by source, 0..1; those not named share what is left as they come. 0: never drawn.",
    )
    transition: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Part of the stage, at its start, over which source weights move from the stage before to its own.",
    )
    blend: Blend | None = Field(
        default=None,
        description="Sources mixed in late; one that source_weights does not name comes in this part only.",
    )
    long_documents: Literal["split", "truncate", "drop"] = Field(
        default="split", description="What to do with documents longer than the context."
    )

    @field_validator("source_weights")
    @classmethod
    def _weights(cls, weights: dict[str, float] | None) -> dict[str, float] | None:
        _shares("source_weights", weights or {})
        return weights


def _shares(key: str, shares: dict[str, float]) -> float:
    """The sum of shares by source; ValueError where they can be none."""
    for source, share in shares.items():
        if not (isfinite(share) and share >= 0):
            raise ValueError(f"{key}.{source} is {share:g}: a share must be between 0 and 1")
    if (total := sum(shares.values())) > 1 + 1e-6:
        raise ValueError(f"{key} sum to {total:g}: these are shares of the stage's tokens, they must not exceed 1")
    return total


class HeldOut(Section):
    fraction: float = Field(
        default=0.001, ge=0, lt=1, description="Part of the deduplication clusters never trained on."
    )
    tokens: int = Field(default=10_000_000, ge=0, description="Most held-out tokens to pack.")
    context: int | None = Field(
        default=None, ge=1, le=LONGEST, description="Tokens in a held-out sequence; null: the first stage's."
    )


class MixConfig(Section):
    """What is drawn, in which order and how often."""

    preset: Literal["minimax-text-01"] | None = Field(
        default=None, description="Thresholds and stages of a published recipe, where they are not given here."
    )
    scale: float = Field(default=1.0, gt=0, le=1, description="The preset's tokens are multiplied by this.")
    context_scale: float = Field(
        default=1.0, gt=0, le=1, description="The preset's contexts and thresholds are multiplied by this."
    )
    long_qa: list[str] = Field(
        default=[], description="Sources of long-context question answering, for the preset's late blend."
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

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides the plan for given documents, as JSON; a preset's stages say all that it stands for."""
        return self.model_dump(mode="json", exclude={*PRESET_KEYS, "exclude", "compression"})

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if recipe := PRESETS.get(value.get("preset") or ""):
            return _expanded(recipe, value) | value
        if given := sorted((PRESET_KEYS - {"preset"}) & {k for k in value if value[k] not in (1, [])}):
            raise ValueError(f"{given[0]} is for a preset: set preset to one of {', '.join(PRESETS)}, or leave it out")
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
        if self.stages[0].transition:
            raise ValueError("stages.0.transition: the first stage has none before it; set it to 0")
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


def _expanded(recipe: Recipe, value: dict[str, Any]) -> dict[str, Any]:
    """The keys of a `mix:` section that a preset stands for; values that are no numbers are refused later."""
    try:
        scale, length = float(value.get("scale", 1)), float(value.get("context_scale", 1))
        qa = [str(name) for name in value.get("long_qa", [])]
        share, last = recipe.blend
        stages = []
        for i, (name, context, rope_base, tokens, shares) in enumerate(recipe.stages):
            stage: dict[str, Any] = {"name": name, "context": max(1, round(context * length)), "rope_base": rope_base}
            stage |= {"tokens": max(1, round(tokens * scale)), "transition": recipe.transition if i else 0.0}
            stage |= {"shares": shares and dict(zip(CLASSES, shares, strict=True))}
            if qa and i:
                stage["blend"] = {"sources": {source: share / len(qa) for source in qa}, "last": last}
            stages.append(stage)
        medium, long = (max(1, round(n * length)) for n in recipe.thresholds)
    except (TypeError, ValueError, OverflowError):
        return {"stages": [{"name": "main", "context": 1, "tokens": 1}]}
    return {"thresholds": {"medium": medium, "long": long}, "stages": stages}
