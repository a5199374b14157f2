"""Training a tokeniser: the sample by source, and models that are the same bytes again and again."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece
import tokenizers

from dataprep import tokenizer_training
from dataprep.storage import UserError
from dataprep.tokenizer import BOS, TokensConfig, load
from dataprep.tokenizer_training import sample, train
from tests.dataprep.test_tokenizer import CONFIG, CORPUS, encode


def test_training_gets_no_word_longer_than_a_piece(monkeypatch) -> None:
    """The library's training takes time by the square of a word's length: hours for a megabyte of one letter."""
    monkeypatch.setattr(tokenizer_training, "TRAINING_PIECE", 8)
    vocabulary = json.loads(train(["a" * 1000], CONFIG))["model"]["vocab"]
    assert {"a" * 8} <= set(vocabulary) and not any("a" * 9 in token for token in vocabulary)


def test_training_does_not_depend_on_order_or_threads(monkeypatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    first = train(CORPUS, CONFIG)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert train(iter(CORPUS[::-1]), CONFIG) == first
    assert train(CORPUS[:4], CONFIG) != first


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("It's 12345 m", ["It", "'s", "Ġ", "123", "45", "Ġm"]),
        ("a  b\n\n c...\nd", ["a", "Ġ", "Ġb", "ĊĊ", "Ġc", "...Ċ", "d"]),
        ("e\u0301a", ["eÌģa"]),  # a combining mark stays in its word
    ],
)
def test_where_text_is_cut(text: str, pieces: list[str]) -> None:
    split = tokenizers.Tokenizer.from_str(train(CORPUS[:1], CONFIG).decode()).pre_tokenizer.pre_tokenize_str(text)
    assert [piece for piece, _ in split] == pieces


@pytest.mark.parametrize("kind", ["sentencepiece-bpe", "sentencepiece-unigram"])
def test_a_sentencepiece_model(kind: str, tmp_path: Path) -> None:
    config = TokensConfig(kind=kind, vocab_size=400, bos=True)
    model = train(CORPUS, config)
    assert train(iter(CORPUS), config) == model
    (tmp_path / "t.model").write_bytes(model)
    tok = load(str(tmp_path / "t.model"), config)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model)
    texts = [CORPUS[0], "", " leading, tabs\tand\nlines\n", f"\0 {config.eos} {BOS} \u2581 \U0001f642"]
    for text, ids in zip(texts, encode(tok, texts), strict=True):
        assert ids == [tok.bos, *oracle.encode(text), tok.eos]
    assert [tok.decode(ids[1:-1]) for ids in map(np.array, encode(tok, texts[:3]))] == texts[:3]


def test_a_corpus_too_small_for_the_vocabulary() -> None:
    with pytest.raises(UserError, match="sentencepiece cannot train"):
        train([""], TokensConfig(kind="sentencepiece-bpe"))


def partitions(directory: Path, count: int = 5, rows: int = 60) -> list[str]:
    directory.mkdir()
    paths = []
    for p in range(count):
        texts = [f"{p}:{r} " + "x" * (80 + r) for r in range(rows)]
        doc = pa.array([(p << 40) + r for r in range(rows)], pa.uint64())
        path = directory / f"p{p}.documents.parquet"
        pq.write_table(pa.table({"doc": doc, "text": pa.array(texts, pa.large_string())}), path, row_group_size=16)
        paths.append(str(path))
    return paths


def test_sample_takes_an_equal_share_of_every_partition(tmp_path: Path) -> None:
    paths = partitions(tmp_path / "a")
    texts = list(sample({"a": paths}, {"a": 5000}, 0))
    for p in range(5):
        mine = [t for t in texts if t.startswith(f"{p}:")]
        assert sum(map(len, mine)) == 1000
        rows = [int(t.split(":")[1].split()[0]) for t in mine]
        assert len({row // 16 for row in rows}) == 1  # one row group is enough
        assert rows != sorted(rows)
    assert list(sample({"a": partitions(tmp_path / "b")[::-1]}, {"a": 5000}, 0)) == texts
    assert list(sample({"a": paths}, {"a": 5000}, 1)) != texts


def test_sample_of_a_small_corpus_is_the_corpus(tmp_path: Path, monkeypatch) -> None:
    paths = partitions(tmp_path / "a")
    assert sorted(sample({"a": paths}, {"a": 10**8}, 0)) == sorted(
        t for p in paths for t in pq.read_table(p)["text"].to_pylist()
    )
    monkeypatch.setattr(tokenizer_training, "SAMPLED_PARTITIONS", 2)
    texts = list(sample({"a": paths}, {"a": 2000}, 0))
    assert len({t[0] for t in texts}) == 2
    assert sum(map(len, texts)) == 2000


def test_sources_are_sampled_by_their_own_sizes(tmp_path: Path) -> None:
    paths = {name: partitions(tmp_path / name, rows=40) for name in ("a", "b", "c")}
    small = {"a": 4000, "b": 300, "c": 0}
    texts = list(sample(paths, small, 0))
    assert len("".join(texts)) == 4300
    assert texts == [*sample(paths, {"a": 4000}, 0), *sample(paths, {"b": 300}, 0)]


def test_a_small_partition_leaves_its_part_to_others(tmp_path: Path) -> None:
    paths = [*partitions(tmp_path / "a", count=3), *partitions(tmp_path / "b", count=1, rows=1)]
    texts = list(sample({"a": paths}, {"a": 9000}, 0))
    assert 8900 <= len("".join(texts)) <= 9000
