"""Tokens: load a tokeniser and encode documents with it.

Text is text: a control token's name that occurs in a document ("<|endoftext|>") is encoded as the characters it
consists of. Control tokens come from here alone: EOS behind every document and, if wanted, BOS before it.

Byte-level BPE is encoded by `dataprep.byte_level`, any other tokeniser by its own library. The ids are the library's.
"""

import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import xxhash
from pydantic import Field, field_validator
from sentencepiece import SentencePieceProcessor

from dataprep.byte_level import ByteLevelBPE
from dataprep.config import Section
from dataprep.pretokenizer import Unsupported
from dataprep.scripts import scripts_of
from dataprep.storage import UserError, array_buffers, binary_array, fingerprint, read_bytes, runs

EOS = "<|endoftext|>"
BOS = "<|startoftext|>"
USUAL_EOS = (EOS, "</s>", "<eos>", "<|end_of_text|>", "<end_of_sentence>", "<|eos|>", "[EOS]", "<|im_end|>")
USUAL_BOS = (BOS, "<s>", "<bos>", "<|begin_of_text|>", "<beginning_of_sentence>", "<|bos|>", "[BOS]", EOS)

PIECE = 1 << 20  # bytes of text that a library gets as one string: it takes 150 times as much memory
LINE_BREAK, SPACE = re.compile(rb"[^\0-\x20](\n)(?=[^\0-\x20])"), re.compile(rb"[^\0-\x20]( )(?=[^\0-\x20])")
BLOCK = 4 << 20  # bytes of text in one call
TOKENS = pa.schema([("doc", pa.uint64()), ("n_tokens", pa.uint32()), ("ids", pa.large_binary())])


class TokensConfig(Section):
    """Which tokeniser to use, or how to train one."""

    tokenizer: str | None = Field(
        default=None,
        description="path or URL of a tokenizer.json or a SentencePiece .model; null = train one on the corpus",
    )
    kind: Literal["byte-level-bpe", "sentencepiece-bpe", "sentencepiece-unigram"] = Field(
        default="byte-level-bpe", description="what to train; byte-level BPE is encoded many times faster"
    )
    vocab_size: int = Field(default=32768, ge=300, le=1 << 22, description="entries of the trained vocabulary")
    sample_mb: float = Field(default=100, gt=0, description="megabytes of text to train on")
    source_weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = Field(
        default={},
        description="weight of a source's bytes in the sample, 1 where none is given: 3 = three times its share, "
        "as far as it has text; 0 = nothing of it",
    )
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


def read(path: str) -> bytes:
    """A tokeniser file's bytes; UserError where it cannot be read."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"tokens.tokenizer: there is no file {path}") from None
    except (OSError, ImportError, ValueError) as error:
        raise UserError(f"tokens.tokenizer: {path} cannot be read ({error}); name a tokeniser file") from None


def identity(data: bytes, config: TokensConfig) -> str:
    """The fingerprint of a tokeniser: all that its ids depend on, wherever its file lies."""
    return fingerprint([xxhash.xxh3_128_hexdigest(data), config.eos, config.bos])


def cuts(
    data: bytes | memoryview, start: int, end: int, space: bool = False, most: int = 0
) -> Iterator[tuple[int, int]]:
    """Pieces (start, end) of UTF-8 data[start:end], of at most `most` bytes (0: PIECE); at least one, maybe empty.

    A cut lies, best first, behind a line break between visible characters, before a space between them, between any two
    characters. At the first two nearly all tokenisers cut anyway, so that the ids are those of the whole text.
    space: for a library that puts a space before every piece: cut at spaces only, which are left out, if there are any.
    """
    most = most or PIECE
    while end - start > most:
        middle = start + most // 2
        window = data[middle : start + most]
        breaks = [] if space else [m.end(1) for m in LINE_BREAK.finditer(window)][-1:]
        if breaks := breaks or [m.start(1) for m in SPACE.finditer(window)][-1:]:
            cut = behind = middle + breaks[0]
            behind += space
        else:
            cut = start + most
            while data[cut] & 0xC0 == 0x80:
                cut -= 1
            behind = cut
        yield start, cut
        start = behind
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
    adds_space: bool = False  # before every text


class Tokenizer:
    """A loaded tokeniser. eos, bos: ids (bos None if not wanted). dtype: "uint16" or "uint32", by vocab_size."""

    def __init__(self, backend: Backend, path: str, config: TokensConfig):
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
        for start, stop in runs(offsets, BLOCK):
            ids, ends = encode(data, offsets[start : stop + 1])
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
            for a, b in cuts(data.data, start, end, self._backend.adds_space):
                rows.append(row)
                texts.append(str(data.data[a:b], "utf-8", "replace"))
        found = self._backend.encode(texts)
        ends = np.zeros(len(offsets), np.int64)
        np.add.at(ends, np.array(rows) + 1, [len(ids) for ids in found])
        return np.fromiter(itertools.chain.from_iterable(found), np.int64), np.cumsum(ends)

    def decode(self, ids: np.ndarray) -> str:
        """The text of some ids, control tokens by their names."""
        return self._backend.decode(ids.tolist())


def load(path: str, config: TokensConfig) -> Tokenizer:
    """The tokeniser in a tokenizer.json or SentencePiece .model. UserError if it cannot be read or lacks EOS or BOS."""
    data = read(path)
    try:
        backend = _sentencepiece(data) if path.endswith(".model") else _huggingface(data, config)
    except Exception as error:  # the libraries raise plain Exception and RuntimeError
        kind = "SentencePiece model" if path.endswith(".model") else "tokenizer.json"
        raise UserError(f"tokens.tokenizer: {path} is not a {kind} that can be read: {error}") from None
    return Tokenizer(backend, path, config)


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
        adds_space=processor.EncodeAsPieces("a")[0].startswith("\u2581"),
    )


def encode_table(documents: pa.Table, tokenizer: Tokenizer) -> tuple[pa.Table, pa.Table]:
    """The `tokens` table (TOKENS) of documents(doc, source, text), row by row, and what `aggregates` needs of them."""
    text = documents["text"]
    ids, offsets = tokenizer.encode(text)
    little = ids.astype(ids.dtype.newbyteorder("<"), copy=False)
    n_tokens = pa.array(np.diff(offsets), pa.uint32())
    encoded = binary_array(little.view(np.uint8), offsets * ids.itemsize)
    counted = {
        "source": documents["source"].cast(pa.string()),
        "script": scripts_of(text).cast(pa.string()),
        "tokens": n_tokens,
        "bytes": pc.binary_length(text),
    }
    return pa.table([documents["doc"], n_tokens, encoded], TOKENS), pa.table(counted)


def aggregates(counted: pa.Table) -> dict[str, Any]:
    """documents, tokens and bytes of text, each source -> count; scripts: script -> {tokens, bytes}."""
    columns = {"documents": ("tokens", "count"), "tokens": ("tokens", "sum"), "bytes": ("bytes", "sum")}

    def sums(key: str) -> list[dict[str, Any]]:
        return counted.group_by(key).aggregate(list(columns.values())).sort_by(key).to_pylist()

    sources = sums("source")
    by_source = {name: {row["source"]: row["_".join(c)] for row in sources} for name, c in columns.items()}
    scripts = {row["script"]: {"tokens": row["tokens_sum"], "bytes": row["bytes_sum"]} for row in sums("script")}
    return by_source | {"scripts": scripts}
