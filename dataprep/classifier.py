"""The quality classifier: scores of documents from one safetensors file. Trained in `dataprep/train_classifier.py`."""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import safetensors
from pydantic import Field, field_validator
from safetensors import numpy as arrays

from dataprep import storage
from dataprep.config import Section
from dataprep.storage import UserError, array_buffers
from kernels.classifier import FOLDING, means
from kernels.words import word_hashes

FORMAT = "trivium-classifier"
VERSION = 2  # of the file; raise it when scores of the same file would change
RATINGS = ("knowledge", "helpfulness")  # graded; the paper's other dimension is the domain
HEADS = (*RATINGS, "quality")  # `quality` is learnt from good/bad labels


class ClassifierConfig(Section):
    """What the quality classifier learns from, and how."""

    labels: tuple[str, ...] = Field(
        (),
        description="labelled rows, JSONL or Parquet (files, directories, globs or URLs): text, and any of knowledge, "
        "helpfulness, domain, label; empty: what jobs/label.py collected",
    )
    scale: float = Field(5, gt=0, description="highest rating of knowledge and helpfulness; the lowest is 0")
    held_out: float = Field(
        0.2, gt=0, lt=1, description="share of the rows not trained on: half calibrate, half are tested on"
    )
    buckets: int = Field(
        1 << 20, gt=0, le=1 << 28, description="rows of the table that n-grams are hashed to; a power of two"
    )
    dimensions: int = Field(16, gt=0, le=1024, description="length of an embedding")
    epochs: int = Field(5, gt=0, description="passes over the rows")
    rate: float = Field(0.1, gt=0, description="learning rate at the start; it falls linearly to 0")
    characters: int = Field(20_000, gt=0, description="of a labelled text, so many are read")
    seed: int = Field(0, description="other seed, other split and order")

    @field_validator("buckets")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"must be a power of two, such as {1 << value.bit_length() - 1}")
        return value


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained classifier.

    heads: names of the outputs that stand alone, each in 0..1. domains: names behind the softmax; () = no such head.
    table: float32[buckets, outputs], what an n-gram adds to each output. bias: float32[outputs].
    about: `config`, `metrics` and whatever else its maker wants to say, as JSON.
    """

    heads: tuple[str, ...]
    domains: tuple[str, ...]
    table: np.ndarray
    bias: np.ndarray
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str) -> "Classifier":
        """Read a model. UserError where it is none, or of another version or shape."""
        try:
            data = storage.read_bytes(path)
            tensors = arrays.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            about = json.loads(header["__metadata__"][FORMAT])
            if about["version"] != VERSION:
                raise UserError(f"{path} has version {about['version']}, this program reads {VERSION}; train it again")
            heads, domains = tuple(map(str, about["heads"])), tuple(map(str, about["domains"]))
            rows = int(about["config"]["buckets"])
            more = {name: about[name] for name in ("config", "metrics")}
        except FileNotFoundError:
            raise UserError(f"there is no classifier {path}; train one with jobs/classifier.py") from None
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} is no classifier of ours ({error}); train one with jobs/classifier.py") from None
        outputs = len(heads) + len(domains)
        for name, shape in {"table": (rows, outputs), "bias": (outputs,)}.items():
            array = tensors.get(name)
            if array is None or array.dtype != np.float32 or array.shape != shape or not np.isfinite(array).all():
                found = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
                raise UserError(f"{path}: {name} is {found}, not finite float32{list(shape)}; train the model again")
        if not rows or rows & (rows - 1) or not outputs:
            raise UserError(f"{path}: {rows} buckets (a power of two is needed), {outputs} outputs; train it again")
        return cls(heads, domains, tensors["table"], tensors["bias"], more)

    def save(self, path: str) -> None:
        """Write the model to a local path; the same model gives the same bytes."""
        about = {"version": VERSION, "heads": self.heads, "domains": self.domains, **self.about}
        # One entry of metadata: the library writes several in any order.
        metadata = {FORMAT: storage.canonical_json(about).decode()}
        with open(path, "wb") as file:
            file.write(arrays.save({"table": self.table, "bias": self.bias}, metadata))

    def score(self, text: pa.ChunkedArray) -> pa.Table:
        """A row for each text (large_string, no nulls): a float32 in 0..1 per head, and `domain` (dictionary string)
        where there are domains. A text without a word gets what the labelled rows had on average."""
        words, offsets = word_hashes(*array_buffers(text), FOLDING)
        logits = self.logits(words, offsets)
        with np.errstate(over="ignore"):
            scores = 1 / (1 + np.exp(-logits[:, : len(self.heads)]))
        columns = {name: pa.array(np.ascontiguousarray(scores[:, k])) for k, name in enumerate(self.heads)}
        if self.domains:
            codes = logits[:, len(self.heads) :].argmax(axis=1)
            columns["domain"] = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(self.domains))
        return pa.table(columns)

    def logits(self, words: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """float32[documents, outputs] of documents as word hashes."""
        return means(words, offsets, self.table) + self.bias
