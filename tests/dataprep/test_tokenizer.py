"""The tokeniser: loading and encoding, against the libraries called plainly, text by text."""

import dataclasses
import io
import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import models, normalizers, pre_tokenizers

from dataprep import tokenizer
from dataprep.storage import UserError
from dataprep.tokenizer import BOS, EOS, Tokenizer, TokensConfig, load
from dataprep.tokenizer_training import train

SYLLABLES = ["ka", "lo", "mi", "ter", "an", "sho", "é", "ß", "न", "मि", "字", "漢"]


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    made = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(80)]
    return "".join(
        rng.choice(made) + rng.choice([" ", " ", " ", ", ", ".\n", "\n\n", " 123456 "]) for _ in range(count)
    )


CORPUS = [words(seed, 400) for seed in range(8)]
CONFIG = TokensConfig(vocab_size=500)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_bytes(train(CORPUS, CONFIG))
    return str(path)


def encode(tok: Tokenizer, texts: list[str]) -> list[list[int]]:
    ids, offsets = tok.encode(pa.array(texts, pa.large_string()))
    assert ids.dtype == tok.dtype
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def edited(path: str, tmp_path: Path, change: Any) -> str:
    description = json.loads(Path(path).read_bytes())
    change(description)
    target = tmp_path / "edited.json"
    target.write_text(json.dumps(description))
    return str(target)


def test_trained_vocabulary(trained: str) -> None:
    tok = load(trained, CONFIG)
    assert tok.vocab_size == CONFIG.vocab_size
    assert tok.dtype == "uint16"
    assert tok.decode(np.array([tok.eos])) == EOS
    compression = len(encode(tok, CORPUS[:1])[0]) / len(CORPUS[0].encode())
    assert compression < 0.6


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=40), max_size=5))
def test_any_text_comes_back(trained: str, texts: list[str]) -> None:
    tok = load(trained, CONFIG)
    oracle = tokenizers.Tokenizer.from_file(trained)
    oracle.encode_special_tokens = True
    for text, ids in zip(texts, encode(tok, texts), strict=True):
        assert ids == [*oracle.encode(text, add_special_tokens=False).ids, tok.eos]
        assert tok.decode(np.array(ids[:-1], tok.dtype)) == text


def test_control_tokens_in_a_text_are_text(trained: str, tmp_path: Path) -> None:
    text = f"before{EOS}after {EOS} {BOS}"
    both = tmp_path / "both.json"
    both.write_bytes(train(CORPUS, TokensConfig(vocab_size=400, bos=True)))

    def not_special(description: dict) -> None:
        description["added_tokens"][0]["special"] = False

    for path, bos in ((trained, False), (str(both), True), (edited(trained, tmp_path, not_special), False)):
        tok = load(path, TokensConfig(bos=bos))
        (ids,) = encode(tok, [text])
        assert ids.count(tok.eos) == 1 and ids[-1] == tok.eos
        assert (ids.count(tok.bos), ids[0] == tok.bos) == ((1, True) if bos else (0, False))
        assert tok.decode(np.array(ids[bos:-1])) == text


def test_a_model_that_spells_control_tokens_is_refused(tmp_path: Path) -> None:
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in "abc</s>")]
    made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0))
    made.add_special_tokens(["</s>"])
    made.save(str(tmp_path / "unigram.json"))
    with pytest.raises(UserError, match="would turn the text '</s>' into the control token"):
        load(str(tmp_path / "unigram.json"), TokensConfig())


def test_settings_in_the_file_that_would_lose_or_change_text(trained: str, tmp_path: Path) -> None:
    def harmful(description: dict) -> None:
        description["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
        description["model"]["dropout"] = 0.5

    assert encode(load(edited(trained, tmp_path, harmful), CONFIG), CORPUS) == encode(load(trained, CONFIG), CORPUS)


def test_ids_beyond_16_bits_and_gaps(trained: str, tmp_path: Path) -> None:
    def far(description: dict) -> None:
        (last,) = [token for token, k in description["model"]["vocab"].items() if k == CONFIG.vocab_size - 1]
        description["model"]["vocab"][last] = 70_000

    tok = load(edited(trained, tmp_path, far), CONFIG)
    assert (tok.vocab_size, tok.dtype) == (70_001, "uint32")
    (ids,) = encode(tok, [CORPUS[0] * 3])
    assert tok.decode(np.array(ids[:-1])) == CORPUS[0] * 3


@pytest.mark.parametrize("by_library", [False, True])
def test_blocks_and_pieces_change_nothing(trained: str, monkeypatch, by_library: bool) -> None:
    tok = load(trained, TokensConfig())
    if by_library:
        tok._backend = dataclasses.replace(tok._backend, fast=None)
    texts = ["", *CORPUS, "", "x" * 3, " ".join(CORPUS)]
    whole = encode(tok, texts)
    monkeypatch.setattr(tokenizer, "BLOCK", 1000)
    assert encode(tok, texts) == whole
    monkeypatch.setattr(tokenizer, "PIECE", 128)
    assert encode(tok, texts) == whole
    sliced = pa.array(texts, pa.large_string())[3:7]
    ids, offsets = tok.encode(pa.chunked_array([sliced[:1], sliced[1:]]))
    assert ids.tolist() == list(itertools.chain(*whole[3:7]))
    assert np.diff(offsets).tolist() == [len(w) for w in whole[3:7]]


@settings(deadline=None)
@given(st.text(alphabet="ab \n\t\u3000é漢🙂", max_size=300), st.integers(4, 60))
def test_cuts_cover_the_text(text: str, size: int) -> None:
    data = b"?" + text.encode() + b"?"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE", size)
        pieces = list(tokenizer.cuts(data, 1, len(data) - 1))
    assert "".join(data[a:b].decode() for a, b in pieces) == text
    assert all(b - a <= size for a, b in pieces)
    assert len(pieces) <= 1 + 4 * len(data) // size


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (b"one two three\nfour five six", [b"one two three\n", b"four five six"]),
        (b"one two three four\n\nfive si", [b"one two three", b" four\n\nfive si"]),
        (b"one-two-three-four  five-six", [b"one-two-three-four  ", b"five-six"]),
        ("漢".encode() * 9, ["漢".encode() * 6, "漢".encode() * 3]),
    ],
)
def test_where_a_long_text_is_cut(monkeypatch, text: bytes, pieces: list[bytes]) -> None:
    monkeypatch.setattr(tokenizer, "PIECE", 20)
    assert [text[a:b] for a, b in tokenizer.cuts(text, 0, len(text))] == pieces


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory) -> str:
    model = io.BytesIO()
    lines = [line for text in CORPUS for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, num_threads=1, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return str(path)


def test_sentencepiece(sentencepiece_model: str) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_file=sentencepiece_model)
    tok = load(sentencepiece_model, TokensConfig(bos=True))
    assert (tok.eos, tok.bos, tok.vocab_size) == (oracle.eos_id(), oracle.bos_id(), oracle.vocab_size())
    texts = [CORPUS[0], "", "ends</s> here <s>", "new\nline \U0001f642"]
    for text, ids in zip(texts, encode(tok, texts), strict=True):
        assert ids == [tok.bos, *oracle.encode(text), tok.eos]
        assert tok.decode(np.array(ids[1:-1])) == text


def test_long_texts_with_spaces_are_encoded_as_if_whole(sentencepiece_model: str, monkeypatch) -> None:
    """The library begins every text with a space, which a piece of a text must not get."""
    tok = load(sentencepiece_model, TokensConfig())
    texts = [*CORPUS, "a\n b  c " * 100, " " * 300, "x" * 300]
    expected = encode(tok, texts)
    monkeypatch.setattr(tokenizer, "PIECE", 200)
    found = encode(tok, texts)
    assert found[:-2] == expected[:-2]
    assert [tok.decode(np.array(ids[:-1])).replace(" ", "") for ids in found[-2:]] == ["", "x" * 300]


def test_end_of_text_is_found_by_its_usual_names(tmp_path: Path) -> None:
    for name in ("</s>", "<|end_of_text|>", "<mine>"):
        made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.normalizer = normalizers.Lowercase()
        made.add_special_tokens([name])
        made.save(str(tmp_path / "t.json"))
        if name == "<mine>":
            with pytest.raises(UserError, match=r"no end-of-text token \(<\|endoftext\|>, .*name it as tokens\.eos"):
                load(str(tmp_path / "t.json"), TokensConfig())
        tok = load(str(tmp_path / "t.json"), TokensConfig(eos=name))
        assert encode(tok, ["a b"]) == [[0, 1, 3]]
        with pytest.raises(UserError, match="no beginning-of-text token"):
            load(str(tmp_path / "t.json"), TokensConfig(eos=name, bos=True))


def test_fingerprint_stands_for_the_file_and_the_choice_of_control_tokens(trained: str) -> None:
    data = Path(trained).read_bytes()
    others = [(data + b"\n", CONFIG), (data, TokensConfig(bos=True)), (data, TokensConfig(eos=BOS))]
    assert len({tokenizer.identity(*pair) for pair in [(data, CONFIG), *others]}) == 4
    assert tokenizer.identity(data, TokensConfig(vocab_size=999, tokenizer=trained)) == tokenizer.identity(data, CONFIG)


@pytest.mark.parametrize("name", ["t.json", "t.model"])
def test_files_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="there is no file"):
        load(str(tmp_path / name), TokensConfig())
    (tmp_path / name).write_bytes(b'{"model": 3}')
    with pytest.raises(UserError, match=f"{name} is not a "):
        load(str(tmp_path / name), TokensConfig())


def test_a_directory_is_not_taken_for_a_tokeniser() -> None:
    with pytest.raises(ValidationError, match=r"tokenizer\.json or of a SentencePiece \.model"):
        TokensConfig(tokenizer="some/directory")


def test_tokens_table_is_the_contract(trained: str) -> None:
    tok = load(trained, CONFIG)
    sources = ["a", "b", "b", "a"]
    texts = [*CORPUS[:3], ""]
    columns = [pa.array([9, 8, 7, 6], pa.uint64()), pa.array(sources).dictionary_encode()]
    documents = pa.table([*columns, pa.array(texts, pa.large_string())], names=["doc", "source", "text"])
    table, counted = tokenizer.encode_table(documents, tok)
    assert table.schema == pa.schema({"doc": pa.uint64(), "n_tokens": pa.uint32(), "ids": pa.large_binary()})
    assert table["doc"].to_pylist() == [9, 8, 7, 6]
    ids = [np.frombuffer(value, "<u2").tolist() for value in table["ids"].to_pylist()]
    assert ids == encode(tok, texts)
    assert table["n_tokens"].to_pylist() == [len(row) for row in ids]
    lengths = [len(text.encode()) for text in texts]
    assert tokenizer.aggregates(counted) == {
        "documents": {"a": 2, "b": 2},
        "tokens": {"a": len(ids[0]) + 1, "b": len(ids[1]) + len(ids[2])},
        "bytes": {"a": lengths[0], "b": lengths[1] + lengths[2]},
        "scripts": {
            "Latin": {"tokens": sum(map(len, ids[:3])), "bytes": sum(lengths)},
            "no letters": {"tokens": 1, "bytes": 0},
        },
    }
    empty, none = tokenizer.encode_table(documents.slice(0, 0), tok)
    assert (len(empty), empty.schema, tokenizer.aggregates(none)["tokens"]) == (0, table.schema, {})
