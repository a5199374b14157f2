"""Byte-level BPE against the `tokenizers` library: the same ids for every text, through every kind of tokeniser."""

import itertools
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from dataprep import byte_level, nfc
from dataprep.byte_level import ByteLevelBPE
from dataprep.pretokenizer import Unsupported
from dataprep.storage import array_buffers
from dataprep.tokenizer import TokensConfig, load
from kernels import bpe
from tests.dataprep.hostile import ALPHABET, TEXTS, characters
from tests.dataprep.test_pretokenizer import DEEPSEEK, LLAMA3, O200K, QWEN

WORDS = (
    "the then there hello world it's I'LL we've कर्म नहीं किताब कि 漢字 かな 東京 слово слова été "
    "\n\n    x = f(1234) <think> "
)


def train(patterns: tuple[str, ...], nfc: bool = False, use_regex: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    if nfc:
        made.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    made.train_from_iterator([WORDS * 5, ALPHABET * 3, *(WORDS[k:] for k in range(30))], trainer)
    made.encode_special_tokens = True
    return made


def added(tokenizer: Tokenizer) -> Tokenizer:
    plain = ["<think>", "<thinking>", "<|", "  ", "é>", "ab<|e"]
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in plain])
    tokenizer.add_tokens([AddedToken(t, normalized=True) for t in ("   ", "e\u0301x", "ü", "the<")])
    tokenizer.add_special_tokens(["<|end of it|>"])
    return tokenizer


def edited(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    description = json.loads(tokenizer.to_str())
    description["model"] |= changes
    made = Tokenizer.from_str(json.dumps(description))
    made.encode_special_tokens = True
    return made


TOKENIZERS = {
    "qwen": added(train((QWEN,), nfc=True)),
    "o200k": train((O200K,)),
    "llama3": edited(train((LLAMA3,)), ignore_merges=True),
    "deepseek": added(train(DEEPSEEK)),
    "gpt2": train((), use_regex=True),
    "whole": train(()),
}
TOKENIZERS["whole"] = edited(TOKENIZERS["gpt2"])  # the same merges, and no cuts at all
TOKENIZERS["whole"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
NAMES = st.sampled_from(sorted(TOKENIZERS))


def ours(tokenizer: Tokenizer) -> ByteLevelBPE:
    return ByteLevelBPE(json.loads(tokenizer.to_str()), tokenizer.get_added_tokens_decoder())


FAST = {name: ours(tokenizer) for name, tokenizer in TOKENIZERS.items()}


def encode(fast: ByteLevelBPE, texts: list[bytes]) -> list[list[int]]:
    column = pa.array([b"?", *texts], pa.large_binary())[1:]  # the buffer begins before the first text
    ids, offsets = fast.encode(*array_buffers(column))
    assert offsets[0] == 0 and offsets[-1] == len(ids)
    return [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)]


def same(name: str, texts: list[str], fast: ByteLevelBPE | None = None) -> None:
    expected = [e.ids for e in TOKENIZERS[name].encode_batch_fast(texts, add_special_tokens=False)]
    assert encode(fast or FAST[name], [text.encode() for text in texts]) == expected


@settings(deadline=None, max_examples=400)
@given(NAMES, st.lists(TEXTS, max_size=4))
def test_hostile_texts(name: str, texts: list[str]) -> None:
    same(name, texts)


@settings(deadline=None, max_examples=300)
@given(NAMES, st.lists(st.sampled_from(WORDS.split(" ")), max_size=12), st.sampled_from(["", " ", "  "]))
def test_words(name: str, words: list[str], between: str) -> None:
    same(name, [between.join(words)])


PARTS = [
    "<think>",
    "<think",
    "ing>",
    "<|",
    "<|end|>",
    "end|>",
    "|end of it|>",
    "   ",
    " ",
    "e",
    "\u0301",
    "x",
    "u\u0308",
    "ü",
    "é>",
    "ab",
    "the<",
]


@settings(deadline=None, max_examples=400)
@given(
    st.sampled_from(["qwen", "deepseek", "o200k"]), st.lists(st.lists(st.sampled_from(PARTS), max_size=8), max_size=4)
)
def test_added_and_special_tokens(name: str, texts: list[list[str]]) -> None:
    same(name, ["".join(text) for text in texts])


REAL = {
    "Latin": "The café's owner didn't know: was it 1,250 or 12½ euros?\n\nStraße, naïve, Dvořák – “voilà”, she said…",
    "Cyrillic": "Вечером 12-го числа она вернулась домой; шёл дождь. «Где же ключ?» — подумала она.",
    "Han and kana": "明天下午三点,我们在图书馆见面吧。今日は天気がいいので、公園まで歩きました。价格是3000元!",
    "Devanagari": "सुबह बारिश हो रही थी, इसलिए बच्चे स्कूल नहीं गए। उन्होंने घर पर १२ किताबें पढ़ीं और खाना बनाया।",
    "Arabic and Hebrew": "وصل القطار متأخرًا ١٥ دقيقة، فانتظرنا في المحطة. הרכבת איחרה ברבע שעה, וְחיכינו בתחנה.",
    "Korean, decomposed": "기차가 십오 분 늦게 도착했습니다. \u1100\u1161\u11a8 cafe\u0301 นักเรียนมาถึงโรงเรียนแล้ว",
    "code": "def f(x: int) -> str:\n\treturn f'{x:>08,}'  # 100% <|end|>\r\n\n    if (a != b && c[i++] >= 0xFF) {}\n",
}


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_real_text(name: str) -> None:
    same(name, [*REAL.values(), *(text * 3 for text in REAL.values()), "\n".join(REAL.values())])


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
def test_every_kind_of_character(name: str) -> None:
    text = characters(20_000, 3)
    same(name, [text[k : k + 50] for k in range(0, len(text), 50)])


@pytest.mark.parametrize(
    "text", ["a" * 5000, "the" * 700, "漢字" * 2000, " " * 3000 + "x", "ab" * 512, "é" * 512 + "a"]
)
def test_long_words(text: str) -> None:
    for name in TOKENIZERS:
        same(name, [text, text[1:], text[:17]])


def test_a_full_cache_is_emptied(monkeypatch) -> None:
    monkeypatch.setattr(byte_level, "DYNAMIC_WORDS", 1)
    monkeypatch.setattr(byte_level, "POOL", 50)
    fast = ours(TOKENIZERS["qwen"])
    texts = [characters(200, seed) for seed in range(40)] + [f"word{k} and {k}{'x' * (k % 70)}" for k in range(4000)]
    for _ in range(2):
        same("qwen", texts, fast)


BYTES = st.lists(
    st.sampled_from(
        [b"a", b" the", b"\x80", b"\xc3", b"\xe6\xbc", b"\xf0\x9f\x99", b"\xed\xa0\x80", b"\xff", "字".encode()]
    )
)


@settings(deadline=None, max_examples=100)
@given(st.lists(BYTES, min_size=1, max_size=4))
def test_what_is_not_utf8_is_replaced(parts: list[list[bytes]]) -> None:
    texts = [b"".join(p) for p in parts]
    expected = [TOKENIZERS["qwen"].encode(t.decode(errors="replace"), add_special_tokens=False).ids for t in texts]
    assert encode(FAST["qwen"], texts) == expected


MARKS = [chr(code) for code in range(0x110000) if nfc.tables()[0][code]]


@settings(deadline=None, max_examples=1500)
@given(st.text(st.one_of(st.sampled_from(MARKS), st.sampled_from(ALPHABET)), max_size=6))
def test_text_that_passes_the_check_is_in_nfc(text: str) -> None:
    data = np.frombuffer(text.encode(), np.uint8)
    if not len(nfc.may_change(data, np.array([0, len(data)]))):
        assert nfc.compose(text.encode()) == text.encode()


def test_common_text_passes_the_check() -> None:
    for text in ("Été, größer", "слово", "漢字かな", "한국어", "हिन्दी में", "ภาษาที่", "العربية"):
        data = np.frombuffer(text.encode(), np.uint8)
        assert not len(nfc.may_change(data, np.array([0, len(data)]))), text


def replaced(change: Any) -> Tokenizer:
    made = train((QWEN,))
    change(made)
    return made


UNSUPPORTED = {
    "Lowercase": lambda t: setattr(t, "normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "Whitespace": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
    "option lstrip": lambda t: t.add_tokens([AddedToken("<x>", lstrip=True)]),
    "end_of_word_suffix": lambda t: setattr(t.model, "end_of_word_suffix", "</w>"),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_any_other_tokeniser_is_left_to_its_library(reason: str, tmp_path: Path, caplog) -> None:
    made = replaced(UNSUPPORTED[reason])
    if reason != "Whitespace":
        with pytest.raises(Unsupported, match=reason):
            ours(made)
    made.save(str(tmp_path / "t.json"))
    with caplog.at_level(logging.WARNING):
        tok = load(str(tmp_path / "t.json"), TokensConfig(eos="<|end|>"))
    (record,) = caplog.records
    assert ("ByteLevel" if reason == "Whitespace" else reason) in record.message
    texts = ["The <x> hello", "", characters(50, 7)]
    ids, offsets = tok.encode(pa.array(texts, pa.large_string()))
    expected = [[*made.encode(text, add_special_tokens=False).ids, tok.eos] for text in texts]
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == expected


def test_a_supported_tokeniser_says_nothing(tmp_path: Path, caplog) -> None:
    TOKENIZERS["o200k"].save(str(tmp_path / "t.json"))
    load(str(tmp_path / "t.json"), TokensConfig(eos="<|end|>"))
    assert not caplog.records


def test_vocabulary_without_all_bytes_is_refused() -> None:
    made = Tokenizer(models.BPE({"a": 0}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(Unsupported, match="lacks 255 of the 256 bytes"):
        ours(made)


def test_words_with_one_hash_are_told_apart() -> None:
    """Two words of 24 bytes, made so that the hashes in their slots agree."""
    prime, rng = 0x9E3779B97F4A7C15, random.Random(1)

    def mixed(block: int) -> int:
        value = block * prime % 2**64
        return value ^ value >> 29

    first = int.from_bytes(b"abcdefgh", "little")
    while True:
        other = int.from_bytes(bytes(rng.choices(range(97, 123), k=8)), "little")
        change = mixed(first) ^ mixed(other)
        if not change & 0x8080808080808080:
            break
    second = int.from_bytes(b"ijklmnop", "little")
    words = [
        b"".join(n.to_bytes(8, "little") for n in pair) + b"the then"
        for pair in ((first, second), (other, second ^ change))
    ]
    keys = [bpe._key(np.frombuffer(word, np.uint8), 0, 24) for word in words]
    assert keys[0] == keys[1]
    same("whole", [word.decode() for word in words])
