"""The scanners against the library's own pre-tokenisers, character by character and on hostile texts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from dataprep.pretokenizer import (
    BYTE_LEVEL,
    Unsupported,
    compile_pattern,
    compile_pre_tokenizer,
    leaves_nothing_out,
    members,
)
from dataprep.tokenizer_training import SPLIT
from kernels import scan
from tests.dataprep.hostile import ALPHABET, TEXTS, characters

QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
OTHERS = (r"(?:ab|a)(?:c|bcd)?|\d{2,}(?=x)|[^a-z]", r"a{0,3}b|\x41\u0042|a")
PATTERNS = (QWEN, O200K, LLAMA3, BYTE_LEVEL, SPLIT, *DEEPSEEK, *OTHERS)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def pieces(patterns: tuple[str, ...], text: str) -> list[str]:
    data = np.frombuffer(text.encode(), np.uint8)
    scanners = scan.as_arrays([compile_pattern(p) for p in patterns])
    begins, stops, ends = np.zeros(9, np.int64), np.full(9, len(data)), np.zeros(4, np.int64)
    found, level = [0], 0
    while level >= 0:
        count, level = scan.pieces(data, scanners, level, begins, stops, ends)
        found += ends[:count].tolist()
    return [bytes(data[a:b]).decode() for a, b in itertools.pairwise(found)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_kind_of_character(pattern: str) -> None:
    text = characters(30_000, 1)
    assert pieces((pattern,), text) == [piece for piece, _ in split(pattern).pre_tokenize_str(text)]


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(PATTERNS), st.one_of(TEXTS, st.text("abcdx01AB ", max_size=12)))
def test_hostile_texts(pattern: str, text: str) -> None:
    assert pieces((pattern,), text) == [piece for piece, _ in split(pattern).pre_tokenize_str(text)]


@settings(deadline=None, max_examples=150)
@given(TEXTS)
def test_one_pattern_inside_another(text: str) -> None:
    oracle = pre_tokenizers.Sequence([split(p) for p in DEEPSEEK])
    assert pieces(DEEPSEEK, text) == [piece for piece, _ in oracle.pre_tokenize_str(text)]


def test_no_pattern_at_all() -> None:
    assert pieces((), "a b") == ["a b"]


@pytest.mark.parametrize("source", [r"\p{L}", r"[^\s\p{L}\p{N}]", r"\p{Co}", r"\p{Cn}", "(?i:k)", "x"])
def test_members_of_a_set(source: str) -> None:
    text = ALPHABET + characters(20_000, 2) + "kKsSſxX\U0010ffff\U0010fffd\U0004fffe\U000f0000"
    found = {piece for piece, _ in pre_tokenizers.Split(Regex(source), "removed", invert=True).pre_tokenize_str(text)}
    assert {char for char in text if members(source)[ord(char)]} == found


@pytest.mark.parametrize(
    "pattern",
    [r"a+?", r"a++", r"^a", r"a$", r"(?<=a)b", r"(a)\1", r"a*", r"(?:a?)*b", r"(?!ab)c", r"\bx", r"[a&&b]",
     r"[[:alpha:]]", r"(a", r"a)", r"(?i:ß)", r"(?i:ss)", r"x.", r"\p{N}{1,999}"],
)  # fmt: skip
def test_other_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(Unsupported):
        compile_pattern(pattern)


def described(*parts: dict) -> dict:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def test_other_pre_tokenisers_are_refused() -> None:
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    part = {"type": "Split", "pattern": {"Regex": O200K}, "behavior": "Removed", "invert": True}
    assert len(compile_pre_tokenizer(described(part, level))) == 1
    assert len(compile_pre_tokenizer({**level, "use_regex": True})) == 1
    for bad in (
        None,
        level | {"add_prefix_space": True},
        described(level, part),
        described({"type": "Digits", "individual_digits": True}, level),
        described(part | {"invert": False}, level),
        described(part | {"pattern": {"Regex": r"\p{N}"}}, level),
        described(part | {"behavior": "MergedWithNext"}, level),
    ):
        with pytest.raises(Unsupported):
            compile_pre_tokenizer(bad)


def test_whether_a_pattern_leaves_something_out() -> None:
    assert [leaves_nothing_out(compile_pattern(p)) for p in (O200K, QWEN, BYTE_LEVEL, r"\p{N}")] == [
        True,
        True,
        True,
        False,
    ]
