"""Decontamination: how much of an evaluation set's items a document holds, by word n-grams.

An *item* is one record of an evaluation set (of a text file: one line). Case, punctuation and spacing do not matter:
words are those of deduplication's verification folding. An item of fewer words than an n-gram is looked for whole. A
document's *overlap* is the largest share of one item's distinct n-grams that it holds; n = 13 as in Brown et al., arXiv
2005.14165, appendix C. N-grams that more than COMMON items share are the set's own wording ("Answer the following
question ..."), no evidence, and count for nothing.
"""

from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from dataprep.config import Section
from dataprep.phrases import Phrases, hashes, runs
from dataprep.readers import named_records
from dataprep.storage import UserError

COMMON = 100


class EvaluationSet(Section):
    """One evaluation set."""

    path: str = Field(min_length=1, description="a JSONL, Parquet or Arrow file, or text with one item per line")
    fields: tuple[str, ...] = Field(
        ("text",),
        min_length=1,
        description="the record's fields that make up an item, in order (question, choices, ...)",
    )


class DecontaminateConfig(Section):
    """Evaluation sets that must not be trained on."""

    sets: dict[str, EvaluationSet] = Field(default_factory=dict, description="name -> file, or {path, fields}")
    ngram: int = Field(13, ge=2, le=64, description="words per n-gram")
    shortest: int = Field(5, ge=1, description="items of fewer words are passed over: they occur everywhere")
    threshold: float = Field(0.2, gt=0, le=1, description="a document with this share of an item is contaminated")
    action: Literal["drop", "keep"] = Field("drop", description="drop: contaminated documents are not trained on")

    @property
    def drops(self) -> bool:
        """Whether contaminated documents are left out of training and export."""
        return bool(self.sets) and self.action == "drop"

    @field_validator("sets", mode="before")
    @classmethod
    def _paths(cls, sets: Any) -> Any:
        if not isinstance(sets, dict):
            return sets
        return {name: {"path": value} if isinstance(value, str) else value for name, value in sets.items()}


class Index:
    """The n-grams of all evaluation items, ready to be found in documents."""

    def __init__(self, config: DecontaminateConfig):
        self.sets = tuple(config.sets)
        read = [(code, t) for code, (n, s) in enumerate(config.sets.items()) for t in dict.fromkeys(items(n, s))]
        words, offsets = hashes(pa.array([text for _, text in read], pa.large_string()))
        counts = np.diff(offsets)
        lengths = np.where(counts >= config.ngram, config.ngram, counts)
        lengths[counts < config.shortest] = 0
        self.set_of_item = np.array([code for code, _ in read], np.int64)
        grams = [runs(words, offsets, int(n), lengths == n) for n in np.unique(lengths[lengths > 0])]
        none = (np.zeros(0, np.uint64), np.zeros(0, np.int64))
        hashed, owners = (np.concatenate(parts) for parts in zip(none, *grams, strict=True))
        order = np.lexsort((owners, hashed))
        hashed, owners = hashed[order], owners[order]
        new = np.ones(len(hashed), bool)  # an n-gram counts once per item
        new[1:] = (hashed[1:] != hashed[:-1]) | (owners[1:] != owners[:-1])
        keys, shared = np.unique(hashed[new], return_counts=True)
        kept = shared <= COMMON
        # Item numbers of each key, one run after the other: those of keys[k] are items[starts[k]:][:item_counts[k]].
        self.item_counts = shared[kept]
        self.starts = np.cumsum(self.item_counts) - self.item_counts
        self.items = owners[new][np.repeat(kept, shared)]
        self.grams = np.bincount(self.items, minlength=len(read))
        self.phrases = Phrases(keys[kept], set(lengths.tolist()) - {0})
        self.passed_over = dict.fromkeys(self.sets, 0)
        for item in np.nonzero(self.grams == 0)[0]:
            self.passed_over[self.sets[self.set_of_item[item]]] += 1

    @cached_property
    def total(self) -> int:
        """Items that can be found."""
        return int((self.grams > 0).sum())

    def overlaps(self, text: pa.ChunkedArray) -> dict[str, pa.Array]:
        """What each document holds of the item it holds most of.

        evaluation: dictionary string, the item's set (null: none). overlap: float32, share of its n-grams.
        overlap_ngrams: uint32, how many.
        """
        codes = np.full(len(text), -1, np.int64)
        shares, counts = np.zeros(len(text)), np.zeros(len(text), np.int64)
        if pieces := list(self.phrases.find(text)):
            documents, keys = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
            documents, keys = np.divmod(np.unique(documents * len(self.item_counts) + keys), len(self.item_counts))
            many = self.item_counts[keys]
            places = np.repeat(self.starts[keys] + many - np.cumsum(many), many) + np.arange(many.sum())
            pairs = np.repeat(documents, many) * len(self.grams) + self.items[places]
            pairs, count = np.unique(pairs, return_counts=True)
            document, item = np.divmod(pairs, len(self.grams))
            share = count / self.grams[item]
            order = np.lexsort((item, -count, -share, document))
            best = order[np.unique(document[order], return_index=True)[1]]
            at = document[best]
            codes[at], shares[at], counts[at] = self.set_of_item[item[best]], share[best], count[best]
        return {
            "evaluation": pa.DictionaryArray.from_arrays(
                pa.array(codes, pa.int32(), mask=codes < 0), pa.array(self.sets, pa.string())
            ),
            "overlap": pa.array(shares.astype(np.float32)),
            "overlap_ngrams": pa.array(counts.astype(np.uint32)),
        }


@lru_cache(1)
def load(config: str) -> Index:
    """The index of a DecontaminateConfig in JSON, made once per process."""
    return Index(DecontaminateConfig.model_validate_json(config))


def items(name: str, config: EvaluationSet) -> list[str]:
    """The items of an evaluation set. UserError names the file, the record and what is wrong."""
    key = f"quality.decontaminate.sets.{name}"
    first, *others = config.fields
    found = []
    for number, text, fields in named_records(key, config.path, first):
        if absent := [name for name in others if name not in fields]:
            raise UserError(f"{key}: {config.path}, record {number} has no field {absent[0]!r}")
        found.append("\n".join([text, *(s for name in others for s in _strings(fields[name]))]))
    if not found:
        raise UserError(f"{key}: {config.path} has no items; name another file or leave the set out")
    return found


def _strings(value: Any) -> list[str]:
    """The strings in a JSON value, numbers among them, in order."""
    if isinstance(value, dict | list):
        return [s for part in (value.values() if isinstance(value, dict) else value) for s in _strings(part)]
    return [] if value is None else [str(value)]
