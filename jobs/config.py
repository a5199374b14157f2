"""One YAML for the whole pipeline, put together from each package's own model, with overrides from the command line."""

import difflib
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from dataprep import storage
from dataprep.classifier import ClassifierConfig
from dataprep.config import CorpusConfig
from dataprep.labels import LabelsConfig
from dataprep.rules import QualityConfig
from dataprep.storage import UserError
from dataprep.tokenizer import TokensConfig
from dedup.config import DedupConfig
from mixer.config import MixConfig
from trainer.config import TrainConfig


class ExportConfig(BaseModel):
    """What `jobs/export.py` writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    formats: tuple[Literal["parquet", "jsonl.zst", "megatron"], ...] = Field(
        ("parquet",), min_length=1, description="one or more"
    )
    attributes: tuple[str, ...] = Field(("tier", "score", "n_tokens"), description="columns to write beside the text")


class Config(BaseSettings):
    """A pipeline: where its outputs lie, and one section per package."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True)

    root: str = Field(min_length=1, description="directory or URL where all outputs lie (absolute for a submitted job)")
    workers: int | None = Field(None, ge=0, description="tasks at once; null = every CPU; 0 = this process, no Ray")
    corpus: CorpusConfig = Field(description="what to read")
    dedup: DedupConfig = Field(default_factory=DedupConfig, description="exact and near duplicates")
    quality: QualityConfig = Field(default_factory=QualityConfig, description="signals, rules, score and tiers")
    labels: LabelsConfig = Field(default_factory=LabelsConfig, description="ratings by a language model")
    classifier: ClassifierConfig = Field(default_factory=ClassifierConfig, description="the quality classifier")
    tokens: TokensConfig = Field(default_factory=TokensConfig, description="the tokeniser")
    mix: MixConfig = Field(description="the curriculum: stages, tiers, shards")
    train: TrainConfig = Field(default_factory=TrainConfig, description="model and training")
    export: ExportConfig = Field(default_factory=ExportConfig, description="the cleaned corpus, for others")

    @model_validator(mode="after")
    def _names_exist(self) -> "Config":
        """A misspelt name would silently mean other rules, another keeper or another schedule."""
        sources = [label for source in self.corpus.sources for label in source.labels]
        stages = [stage.name for stage in self.mix.stages]
        for key, names, known in (
            ("quality.by_source", self.quality.by_source, sources),
            ("quality.tiers", [tier.source for tier in self.quality.tiers if tier.source], sources),
            ("tokens.source_weights", self.tokens.source_weights, sources),
            ("dedup.source_priority", self.dedup.source_priority, sources),
            ("train.stages", self.train.stages, stages),
        ):
            if unknown := sorted(set(names) - set(known)):
                raise ValueError(f"{key} names {', '.join(unknown)}; there are {', '.join(known)}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # the file and the command line only: no value sneaks in from the environment


def load(path: str, overrides: list[str] | None = None) -> Config:
    """Read and check a configuration file. overrides: `--section.key value` words. UserError names every mistake."""
    try:
        values = yaml.safe_load(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"no configuration file {path}") from None
    except OSError as error:
        raise storage.explain_os_error(error) or UserError(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} must hold a mapping with the sections {', '.join(Config.model_fields)}")
    try:
        return Config(_cli_parse_args=overrides or [], _cli_exit_on_error=False, **values)
    except ValidationError as error:
        errors = [e for e in error.errors() if e["type"] != "too_short" or e["ctx"]["actual_length"] or not e["input"]]
        raise UserError("\n".join(explain(e, path) for e in errors)) from None
    except SettingsError as error:
        why = str(error).removeprefix("error parsing CLI: ")
        raise UserError(
            f"the command line: {why}; --help lists the keys; a list or mapping is given whole, as JSON or YAML flow"
        ) from None


def explain(error: Any, path: str) -> str:
    """One line for one mistake: the key, the value, what would be right."""
    key = ".".join(str(part) for part in error["loc"]) or "configuration"
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _keys(error["loc"][:-1]), 1, 0.5)
        return f"{path}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
    if error["type"] == "missing":
        return f"{path}: {key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    value = error["input"]
    shown = f" = {value!r}" if isinstance(value, str | int | float | bool | None) else ""
    return f"{path}: {key}{shown}: {message}"


def _keys(location: tuple) -> list[str]:
    """The known keys of the section at a location, for a suggestion."""
    model: Any = Config
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        inner = [a for a in [annotation, *getattr(annotation, "__args__", ())] if hasattr(a, "model_fields")]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)
