"""Where the text comes from and how it is cut into corpus partitions: the `corpus` section of the YAML."""

from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dataprep import python_installation

Kind = Literal["jsonl", "parquet", "arrow", "text", "tree", "python-installation"]


class Section(BaseModel):
    """A part of the configuration: an unknown key is a mistake, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Fields(Section):
    """Which fields of a record hold what."""

    text: str = Field("text", min_length=1, description="field that holds the text")
    id: str | None = Field(
        None,
        min_length=1,
        description="field that holds the owner's id; null: `id` where a record has it, else path:record",
    )

    @model_validator(mode="after")
    def _differ(self) -> "Fields":
        if self.id == self.text:
            raise ValueError(f"text and id are both read from {self.text!r}; name two different fields")
        return self


class SourceConfig(Section):
    """One source: a label and the files that belong to it."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="label of the source: letters, digits, `_`, `.`, `-`"
    )
    kind: Kind | None = Field(
        None,
        description="jsonl, parquet, arrow, text (one document per file), tree (all text files of a source tree) or "
        "python-installation (the running interpreter's own files); null: by each file's suffix",
    )
    paths: tuple[str, ...] = Field((), description="files, directories, globs or URLs; `~` is the home directory")
    fields: Fields = Field(
        Fields(text="text", id=None), description="which fields of a record hold the text and the id"
    )
    meta: tuple[str, ...] | None = Field(None, description="further fields to keep in `meta`; null: all of them")
    include: tuple[str, ...] = Field((), description="keep only files whose path matches one of these globs (`*.py`)")
    exclude: tuple[str, ...] = Field((), description="leave out files whose path matches one of these globs")
    max_bytes: int | None = Field(None, gt=0, description="python-installation: take at most so many bytes of files")
    max_record_mb: float = Field(256, gt=0, description="longer records are quarantined, not read into memory (MB)")

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        if self.kind == "python-installation":
            if self.paths:
                raise ValueError(f"source {self.name!r}: python-installation finds its own files; remove `paths`")
        elif not self.paths:
            raise ValueError(f"source {self.name!r}: `paths` is empty; name at least one file, directory, glob or URL")
        elif self.max_bytes is not None:
            raise ValueError(f"source {self.name!r}: `max_bytes` needs kind python-installation")
        return self

    @cached_property
    def max_record(self) -> int:
        """The longest record to read, in bytes."""
        return int(self.max_record_mb * 1e6)

    @property
    def labels(self) -> list[str]:
        """The labels its documents bear: its name, or the names of a Python installation's sub-sources."""
        if self.kind == "python-installation":
            return [f"{self.name}-{part}" for part in python_installation.PARTS]
        return [self.name]


class CorpusConfig(Section):
    """The corpus: its sources and the size of its pieces."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="where the text comes from")
    partition_mb: float = Field(256, gt=0, description="text and meta per corpus partition (MB)")
    group_mb: float = Field(256, gt=0, description="small input files share a task up to so many input bytes (MB)")
    zstd_level: int = Field(3, ge=1, le=19, description="compression level of the documents")

    @field_validator("sources")
    @classmethod
    def _unique(cls, sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
        seen: set[str] = set()
        for label in (label for source in sources for label in source.labels):
            if label in seen:
                raise ValueError(f"two sources bear the label {label!r}; give each its own name")
            seen.add(label)
        return sources

    def source(self, label: str) -> SourceConfig:
        """The source whose documents bear this label (an `Entry.source`)."""
        return next(source for source in self.sources if label in source.labels)
