"""Decontamination: how much of an evaluation set's items a document holds, by word n-grams.

An *item* is one record of an evaluation set (of a text file: one line). Case, punctuation and spacing do not matter:
words are those of deduplication's verification folding. An item of fewer words than an n-gram is looked for whole. A
document's *overlap* is the largest share of one item's distinct n-grams that it holds; n = 13 as in Brown et al., arXiv
2005.14165, appendix C. N-grams that more than COMMON items share are the set's own wording ("Answer the following
question ..."), no evidence, and count for nothing.
"""

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from dataprep.config import Section
from dataprep.readers import named_records
from dataprep.storage import UserError, array_buffers, runs
from kernels.membership import bitmap, members
from kernels.minhash import shingles
from kernels.words import Folding, word_hashes

COMMON = 100
CHUNK = 16 << 20  # bytes of text whose word hashes are in memory at a time
FOLDING: Folding = "verification"


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
    """The n-grams of all evaluation items, ready to be found in documents.

    keys: their hashes, uint64, sorted, without repeats; `pairs`: which item (int64) has which. lengths: how many words
    they have. passed_over: set -> its items with no n-gram to look for; total: all others.
    """

    def __init__(self, config: DecontaminateConfig):
        self.sets = tuple(config.sets)
        read = [(code, t) for code, (n, s) in enumerate(config.sets.items()) for t in dict.fromkeys(items(n, s))]
        self.set_of_item = np.array([code for code, _ in read], np.int64)
        texts = pa.array([text for _, text in read], pa.large_string())
        words, offsets = word_hashes(*array_buffers(texts), FOLDING)
        counts = np.diff(offsets)
        lengths = np.where(counts < config.shortest, 0, np.minimum(counts, config.ngram))
        self.lengths = sorted(set(lengths.tolist()) - {0})
        found = [pa.table({"key": np.zeros(0, np.uint64), "item": np.zeros(0, np.int64)})]
        for n in self.lengths:
            values, value_offsets = shingles(words, offsets, n)
            owner = np.repeat(np.arange(len(read)), np.diff(value_offsets))
            chosen = lengths[owner] == n
            found.append(pa.table({"key": values[chosen], "item": owner[chosen]}))
        pairs = _distinct(pa.concat_tables(found))
        keys, place, sharing = np.unique(pairs["key"], return_inverse=True, return_counts=True)
        self.keys, self.pairs = keys[sharing <= COMMON], pairs.filter(sharing[place] <= COMMON)
        self.bits = bitmap(self.keys)
        self.grams = np.bincount(self.pairs["item"], minlength=len(read))
        missing = np.bincount(self.set_of_item[self.grams == 0], minlength=len(self.sets))
        self.passed_over = dict(zip(self.sets, missing.tolist(), strict=True))
        self.total = int((self.grams > 0).sum())

    def _find(self, text: pa.ChunkedArray) -> pa.Table:
        """(document, key) of every n-gram in documents, int64 and uint64, once each."""
        data, offsets = array_buffers(text)
        found = [pa.table({"document": np.zeros(0, np.int64), "key": np.zeros(0, np.uint64)})]
        for first, end in runs(offsets, CHUNK) if self.lengths else ():
            words, word_offsets = word_hashes(data, offsets[first : end + 1], FOLDING)
            for n in self.lengths:
                values, value_offsets = shingles(words, word_offsets, n)
                places, keys = members(values, self.keys, self.bits)
                documents = first + np.searchsorted(value_offsets, places, side="right") - 1
                found.append(pa.table({"document": documents, "key": self.keys[keys]}))
        return _distinct(pa.concat_tables(found))

    def overlaps(self, text: pa.ChunkedArray) -> dict[str, pa.Array]:
        """What each document holds of the item it holds most of.

        evaluation: dictionary string, the item's set (null: none). overlap: float32, share of its n-grams.
        overlap_ngrams: uint32, how many.
        """
        codes = np.full(len(text), -1, np.int64)
        shares, counts = np.zeros(len(text)), np.zeros(len(text), np.int64)
        held = self._find(text).join(self.pairs, "key", join_type="inner").group_by(["document", "item"])
        found = held.aggregate([([], "count_all")])
        document, item, count = (found[name].to_numpy() for name in ("document", "item", "count_all"))
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


def _distinct(table: pa.Table) -> pa.Table:
    return table.group_by(table.column_names).aggregate([])


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
