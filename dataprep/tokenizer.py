"""Tokens: train a byte-level BPE tokeniser on a sample of the corpus, or load one, and encode documents with it.

Text is text: a control token's name that occurs in a document ("<|endoftext|>") is encoded as the characters it
consists of. Control tokens come from here alone: EOS behind every document and, if wanted, BOS before it.

Byte-level BPE is encoded by `dataprep.byte_level`, any other tokeniser by its own library. The ids are the library's.
"""

import functools
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import tokenizers
import xxhash
from pydantic import BaseModel, ConfigDict, Field, field_validator
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, pre_tokenizers, trainers

from dataprep.byte_level import ByteLevelBPE
from dataprep.pretokenizer import Unsupported
from dataprep.storage import UserError, array_buffers, arrow_file, binary_array, fingerprint, read_bytes
from kernels.words import mix

EOS = "<|endoftext|>"
BOS = "<|startoftext|>"
USUAL_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<end_of_sentence>", "<|eos|>", "[EOS]", "<|im_end|>")
USUAL_BOS = (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<beginning_of_sentence>", "<|bos|>", "[BOS]", EOS)

# Where text is cut before pairs are merged, as in cl100k: contractions, words with one leading character, numbers in
# runs of up to three digits, punctuation, line breaks, white space. Combining marks belong to their words.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECE = 1 << 20  # bytes of text that a library gets as one string: it takes 150 times as much memory
TRAINING_PIECE = 1 << 12  # the same for training, whose time grows with the square of a word
BLOCK = 4 << 20  # bytes of text in one call
SAMPLED_PARTITIONS = 1000


class TokensConfig(BaseModel):
    """Which tokeniser to use, or how to train one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokenizer: str | None = Field(
        default=None,
        description="path or URL of a tokenizer.json or a SentencePiece .model; null = train one on the corpus",
    )
    vocab_size: int = Field(default=32768, ge=300, le=1 << 22, description="entries of the trained vocabulary")
    sample_mb: float = Field(default=100, gt=0, description="megabytes of text to train on")
    eos: str = Field(
        default=EOS, min_length=1, description="end-of-text token; for a loaded tokeniser the usual names as well"
    )
    bos: bool = Field(default=False, description="begin every document with the tokeniser's beginning-of-text token")
    seed: int = Field(default=0, description="chooses the documents to train on")

    @field_validator("tokenizer")
    @classmethod
    def _known_format(cls, value: str | None) -> str | None:
        if value is not None and not value.endswith((".json", ".model")):
            raise ValueError("give the path of a tokenizer.json or of a SentencePiece .model")
        return value


def sample(paths: list[str], config: TokensConfig) -> Iterator[str]:
    """About `sample_mb` of text from corpus partitions (Parquet: doc, text), equal shares from at most 1000 of them.

    Partitions, row groups and documents are taken in the order of a hash. A partition is read one row group at a time
    until its share is full, so the cost is bounded however large the corpus is; its last document may be cut short.
    """
    chosen = sorted(paths, key=functools.partial(_rank, config.seed))[:SAMPLED_PARTITIONS]
    for path in chosen:
        yield from _sample_partition(path, config.sample_mb * 1e6 / len(chosen), config.seed)


def _sample_partition(path: str, share: float, seed: int) -> Iterator[str]:
    left = int(share)
    with arrow_file(path) as file:
        parquet = pq.ParquetFile(file)
        for group in sorted(range(parquet.num_row_groups), key=lambda g: _rank(seed, f"{path}:{g}")):
            documents = parquet.read_row_group(group, ["doc", "text"])
            order = np.argsort(mix(documents["doc"].to_numpy() ^ np.uint64(_rank(seed, "doc"))))
            for row in order:
                data = documents["text"][row].as_py().encode()
                yield data[:left].decode(errors="ignore")
                left -= len(data)
                if left <= 0:
                    return


def _rank(seed: int, name: str) -> int:
    """A path's hash rests on its last part, which does not change when the output directory moves."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{name.rsplit('/', 1)[-1]}".encode())


def train(texts: Iterable[str], config: TokensConfig) -> bytes:
    """The bytes of a tokenizer.json: byte-level BPE with `vocab_size` entries, fewer if the texts run out of pairs.

    The same texts give the same bytes, in any order and for any number of threads.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.eos, BOS] if config.bos else [config.eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (x[a:b].decode() for x in (text.encode() for text in texts) for a, b in cuts(x, 0, len(x), TRAINING_PIECE))
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer.to_str().encode()


def cuts(data: bytes | memoryview, start: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """Pieces (start, end) of UTF-8 data[start:end], each at most `most` bytes; at least one, though it be empty.

    A cut lies, best first, behind a line break between visible characters, before a space between them, between any two
    characters. At the first two nearly all tokenisers cut anyway, so that the ids are those of the whole text; a
    SentencePiece model may begin a piece with one more `▁`.
    """
    while end - start > most:
        window = data[start + most // 2 : start + most]
        found = [m.end() - 1 for m in re.finditer(rb"[^\0-\x20]\n(?=[^\0-\x20])", window)][-1:]
        if found:
            cut = start + most // 2 + found[0] + 1
        elif found := [m.end() - 1 for m in re.finditer(rb"[^\0-\x20] (?=[^\0-\x20])", window)][-1:]:
            cut = start + most // 2 + found[0]
        else:
            cut = start + most
            while data[cut] & 0xC0 == 0x80:
                cut -= 1
        yield start, cut
        start = cut
    yield start, end


@dataclass(frozen=True)
class Backend:
    """What this file needs of a tokeniser library."""

    encode: Callable[[list[str]], list[list[int]]]
    decode: Callable[[list[int]], str]
    token_id: Callable[[str], int | None]
    vocab_size: int  # highest id + 1
    control: tuple[str, ...]  # names of the control tokens
    fast: ByteLevelBPE | None = None  # encodes instead, to the same ids


class Tokenizer:
    """A loaded tokeniser. eos, bos: ids (bos None if not wanted). dtype: "uint16" or "uint32", by vocab_size.

    fingerprint: stands for the file's bytes and the choice of EOS and BOS.
    """

    def __init__(self, backend: Backend, data: bytes, path: str, config: TokensConfig):
        self._backend = backend
        self.vocab_size = backend.vocab_size
        self.dtype = "uint16" if self.vocab_size <= 1 << 16 else "uint32"
        eos_names = USUAL_EOS if config.eos == EOS else (config.eos,)
        eos_name, self.eos = self._find("end-of-text", eos_names, f"{path}; name it as tokens.eos")
        self.bos: int | None = None
        control = {eos_name, *backend.control}
        if config.bos:
            bos_name, self.bos = self._find("beginning-of-text", USUAL_BOS, f"{path}; set tokens.bos to false")
            control.add(bos_name)
        names = sorted(control)
        for name, ids in zip(names, backend.encode(names), strict=True):
            if backend.token_id(name) in ids:
                raise UserError(
                    f"{path} would turn the text {name!r} into the control token of that name, so any document could "
                    "end itself; give another tokeniser (a SentencePiece model in its own .model form)"
                )
        self.fingerprint = fingerprint([xxhash.xxh3_128_hexdigest(data), self.eos, self.bos])

    def _find(self, what: str, names: tuple[str, ...], where: str) -> tuple[str, int]:
        for name in names:
            if (token := self._backend.token_id(name)) is not None:
                return name, token
        raise UserError(f"no {what} token ({', '.join(names)}) in {where}")

    def encode(self, texts: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """(ids of `dtype`, offsets int64, one more than texts) of a large_string column; each text ends with EOS.

        Runs on one thread; needs memory for the ids and some 200 MB. The library gets long texts in pieces.
        """
        data, offsets = array_buffers(texts)
        encode = self._encode_by_library if self._backend.fast is None else self._backend.fast.encode
        blocks, lengths = [np.zeros(0, self.dtype)], [np.zeros(1, np.int64)]
        for rows in _rows(offsets):
            ids, ends = encode(data, offsets[rows.start : rows.stop + 1])
            if self.bos is None:
                control, places = [self.eos], ends[1:]
            else:
                control = [self.bos, self.eos]
                places = np.stack([ends[:-1], ends[1:]], 1).ravel()
            blocks.append(np.insert(ids.astype(self.dtype), places, np.resize(control, len(places))))
            lengths.append(np.diff(ends) + len(control))
        return np.concatenate(blocks), np.cumsum(np.concatenate(lengths))

    def _encode_by_library(self, data: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows, texts = [], []
        for row, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
            for a, b in cuts(data.data, start, end, PIECE):
                rows.append(row)
                texts.append(str(data.data[a:b], "utf-8", "replace"))
        found = self._backend.encode(texts)
        ends = np.zeros(len(offsets), np.int64)
        np.add.at(ends, np.array(rows) + 1, [len(ids) for ids in found])
        return np.fromiter(itertools.chain.from_iterable(found), np.int64), np.cumsum(ends)

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids, control tokens by their names."""
        return self._backend.decode(ids.tolist())


def _rows(offsets: np.ndarray) -> Iterator[range]:
    """Consecutive texts of about BLOCK bytes."""
    start = 0
    while start < len(offsets) - 1:
        stop = max(start + 1, int(np.searchsorted(offsets, offsets[start] + BLOCK)))
        stop = min(stop, len(offsets) - 1)
        yield range(start, stop)
        start = stop


def load(path: str, config: TokensConfig) -> Tokenizer:
    """The tokeniser in a tokenizer.json or SentencePiece .model. UserError if it cannot be read or lacks EOS or BOS."""
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"tokens.tokenizer: there is no file {path}") from None
    try:
        backend = _sentencepiece(data) if path.endswith(".model") else _huggingface(data, config)
    except Exception as error:  # the libraries raise plain Exception and RuntimeError
        kind = "SentencePiece model" if path.endswith(".model") else "tokenizer.json"
        raise UserError(f"tokens.tokenizer: {path} is not a {kind} that can be read: {error}") from None
    return Tokenizer(backend, data, path, config)


def _huggingface(data: bytes, config: TokensConfig) -> Backend:
    # Parallelism comes from processes: many of one thread each are several times faster than one of many threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    description = json.loads(data)
    if "dropout" in description["model"]:
        description["model"]["dropout"] = None  # the same text must give the same ids
    for token in description["added_tokens"]:
        token["special"] |= token["content"] in (config.eos, *USUAL_EOS, *USUAL_BOS)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # that is, as any other text

    fast = None
    try:
        fast = ByteLevelBPE(description, tokenizer.get_added_tokens_decoder())
    except Unsupported as reason:
        logging.getLogger(__name__).warning("the tokeniser is encoded with the library tokenizers: %s", reason)

    def encode(texts: list[str]) -> list[list[int]]:
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return Backend(
        encode=encode,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        token_id=tokenizer.token_to_id,
        vocab_size=max(tokenizer.get_vocab().values()) + 1,  # ids may have gaps
        control=tuple(t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special),
        fast=fast,
    )


def _sentencepiece(data: bytes) -> Backend:
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(data)
    logging.getLogger(__name__).warning("the tokeniser is encoded with the library sentencepiece: it is of that kind")

    def token_id(name: str) -> int | None:
        token = processor.PieceToId(name)
        return None if processor.IsUnknown(token) else token

    size = processor.GetPieceSize()
    return Backend(
        encode=lambda texts: processor.Encode(texts, out_type=int, num_threads=1),
        decode=processor.Decode,
        token_id=token_id,
        vocab_size=size,
        control=tuple(processor.IdToPiece(k) for k in range(size) if processor.IsControl(k)),
    )


def encode_table(documents: pa.Table, tokenizer: Tokenizer) -> tuple[pa.Table, dict[str, Any]]:
    """The `tokens` table of documents(doc, source, text), row by row, and its aggregates.

    Columns: doc; n_tokens uint32; ids large_binary (little-endian `tokenizer.dtype`). Aggregates: documents, tokens and
    bytes of text, each source -> count.
    """
    ids, offsets = tokenizer.encode(documents["text"])
    little = ids.astype(ids.dtype.newbyteorder("<"), copy=False)
    n_tokens = pa.array(np.diff(offsets), pa.uint32())
    table = pa.table(
        {
            "doc": documents["doc"],
            "n_tokens": n_tokens,
            "ids": binary_array(little.view(np.uint8), offsets * ids.itemsize),
        }
    )
    counted = pa.table(
        {
            "source": documents["source"].cast(pa.string()),
            "tokens": n_tokens,
            "bytes": pc.binary_length(documents["text"]),
        }
    )
    sums = counted.group_by("source").aggregate([("tokens", "count"), ("tokens", "sum"), ("bytes", "sum")])
    rows = sums.sort_by("source").to_pylist()
    columns = {"documents": "tokens_count", "tokens": "tokens_sum", "bytes": "bytes_sum"}
    return table, {name: {row["source"]: row[column] for row in rows} for name, column in columns.items()}
