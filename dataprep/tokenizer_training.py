"""Training a tokeniser on a sample of the corpus: byte-level BPE with `tokenizers`, or a SentencePiece model."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow.parquet as pq
import tokenizers
import xxhash
from sentencepiece import SentencePieceTrainer
from tokenizers import decoders, models, pre_tokenizers, trainers

from dataprep.storage import UserError, arrow_file
from dataprep.tokenizer import BOS, PIECE, TokensConfig, cuts
from kernels.words import mix

# Where text is cut before pairs are merged, as in cl100k: contractions, words with one leading character, numbers in
# runs of up to three digits, punctuation, line breaks, white space. Combining marks belong to their words.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SAMPLED_PARTITIONS = 1000  # of a source, at most
TRAINING_PIECE = 1 << 12  # bytes of text that the library gets as one string: its time grows with the square of a word


def sample(partitions: Mapping[str, Sequence[str]], sizes: Mapping[str, int], seed: int) -> Iterator[str]:
    """Texts of every source, in all `sizes[source]` bytes of it, or what it has.

    partitions: source -> its corpus partitions (Parquet: doc, text). Partitions, row groups and documents are taken in
    the order of a hash, equal parts from each partition, what one lacks from those behind it. A partition is read one
    row group at a time until its part is full, so the cost is bounded however large the corpus is; a part's last
    document may be cut short.
    """
    for source in sorted(sizes):
        chosen = sorted(partitions[source], key=lambda path: _rank(seed, path))[:SAMPLED_PARTITIONS]
        left = sizes[source]
        for place, path in enumerate(chosen):
            for data in _sample_partition(path, left // (len(chosen) - place), seed):
                left -= len(data)
                yield data.decode(errors="ignore")


def _sample_partition(path: str, left: int, seed: int) -> Iterator[bytes]:
    with arrow_file(path) as file:
        parquet = pq.ParquetFile(file)
        for group in sorted(range(parquet.num_row_groups), key=lambda g: _rank(seed, f"{path}:{g}")):
            if left <= 0:
                return
            documents = parquet.read_row_group(group, ["doc", "text"])
            order = np.argsort(mix(documents["doc"].to_numpy() ^ np.uint64(_rank(seed, "doc"))))
            for row in order:
                data = documents["text"][row].as_py().encode()[:left]
                left -= len(data)
                yield data
                if left <= 0:
                    return


def _rank(seed: int, name: str) -> int:
    """A path's hash rests on its last part, which does not change when the output directory moves."""
    return xxhash.xxh3_64_intdigest(f"{seed}:{name.rsplit('/', 1)[-1]}".encode())


def train(texts: Iterable[str], config: TokensConfig) -> bytes:
    """The bytes of a tokenizer.json or SentencePiece model with `vocab_size` entries, fewer if the texts lack pairs.

    The same texts in the same order give the same bytes, for any number of threads.
    """
    encoded = (text.encode() for text in texts)
    pieces = (data[a:b].decode() for data in encoded for a, b in cuts(data, 0, len(data), most=TRAINING_PIECE))
    if config.kind == "byte-level-bpe":
        return _train_byte_level(pieces, config)
    return _train_sentencepiece(pieces, config)


def _train_byte_level(pieces: Iterator[str], config: TokensConfig) -> bytes:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[config.eos, BOS] if config.bos else [config.eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer.to_str().encode()


def _train_sentencepiece(pieces: Iterator[str], config: TokensConfig) -> bytes:
    """As Llama 2's: no normalisation, digits alone, runs of spaces, rare characters as their bytes."""
    model = io.BytesIO()
    lines = (line for piece in pieces for line in piece.split("\n") if line)
    try:
        SentencePieceTrainer.Train(
            sentence_iterator=lines, model_writer=model, model_type=config.kind.removeprefix("sentencepiece-"),
            vocab_size=config.vocab_size, hard_vocab_limit=False, character_coverage=0.9995, byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            allow_whitespace_only_pieces=True, split_digits=True, max_sentence_length=PIECE + 1,
            unk_id=0, eos_id=1, bos_id=2 if config.bos else -1, pad_id=-1, eos_piece=config.eos, bos_piece=BOS,
            num_threads=1, minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(f"tokens: sentencepiece cannot train on this corpus with this configuration: {error}") from None
    return model.getvalue()
