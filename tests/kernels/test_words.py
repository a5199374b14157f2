"""The word scanner against its reference, against `re`, and on hostile text."""

import re
import unicodedata
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataprep.storage import array_buffers
from kernels.words import reference_hash, reference_words, word_hashes

FOLDINGS = ["candidate", "verification"]
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("aB9_ .\n\0é́ーก็น้ำ漢かカᄒ한कि‍\u200bשִ٣İς𝟗\U000e0100"),
    ),
    max_size=40,
)


def scan(texts: list[str], folding: str) -> list[list[int]]:
    hashes, offsets = word_hashes(*array_buffers(pa.array(texts, pa.large_string())), folding)
    return [hashes[a:b].tolist() for a, b in pairwise(offsets)]


def words(text: str, folding: str) -> list[str]:
    return list(reference_words(text, folding))


@pytest.mark.parametrize("folding", FOLDINGS)
@given(texts=st.lists(TEXT, max_size=6))
def test_the_kernel_finds_the_words_of_the_reference(texts, folding):
    assert scan(texts, folding) == [[reference_hash(w) for w in reference_words(t, folding)] for t in texts]


@given(text=TEXT)
def test_both_foldings_cut_the_same_words(text):
    assert len(words(text, "candidate")) == len(words(text, "verification"))


@given(text=st.text(st.characters(codec="iso8859-15", exclude_categories=["Cc", "Cf"]), max_size=60))
def test_words_are_those_of_re_where_there_are_no_marks(text):
    assert words(text, "verification") == re.findall(r"\w+", text.lower())


def test_scripts_written_without_spaces_yield_a_word_per_letter():
    assert words("我們用Python3學习。", "verification") == ["我", "們", "用", "python3", "學", "习"]
    assert words("カタカナとひらがな", "verification") == list("カタカナとひらがな")
    assert words("น้ำ", "verification") == ["น้", "ำ"]
    assert words("한국어 문장", "candidate") == ["한국어", "문장"]


def test_candidate_folding_drops_case_digits_and_accents_and_verification_keeps_the_last_two():
    composed, decomposed = "ÉTÉ 2024", unicodedata.normalize("NFD", "été 1999")
    assert words(composed, "candidate") == words(decomposed, "candidate") == ["ete", "0000"]
    assert words("ÉTÉ 2024", "verification") == ["été", "2024"]
    assert words("السَّلَام", "candidate") == words("السلام", "candidate")
    assert words("السَّلَام", "verification") != words("السلام", "verification")


def test_a_mark_or_format_character_alone_is_no_word():
    assert words("\u0301 \u200d \ufeffa\u00adb \u0301", "verification") == ["ab"]


@pytest.mark.parametrize("folding", FOLDINGS)
def test_very_long_words_and_texts_have_the_hashes_of_the_reference(folding):
    texts = ["x" * 1_000_000, "a" + "\u0301" * 10_000, "spam " * 50_000]
    assert scan(texts, folding) == [[reference_hash(w) for w in words(text, folding)] for text in texts]


def test_broken_utf8_is_a_separator_and_never_read_past_the_document():
    documents = [b"ab\xe4\xbd", b"\xbd cd", b"e\xfff\xf0\x9f", b"gh"]
    data = np.frombuffer(b"".join(documents), np.uint8)
    offsets = np.cumsum([0, *map(len, documents)])
    hashes, _ = word_hashes(data, offsets, "verification")
    assert hashes.tolist() == [reference_hash(w) for w in ("ab", "cd", "e", "f", "gh")]


def test_different_words_have_different_hashes():
    numbers = [f"w{i:x}" for i in range(200_000)]
    (hashes,) = scan([" ".join(numbers)], "verification")
    assert len(set(hashes)) == len(numbers)
    low, high = np.array(hashes, np.uint64) & np.uint64(255), np.array(hashes, np.uint64) >> np.uint64(56)
    for part in (low, high):  # each byte value is as frequent as any other: 781 times, give or take 6 sigma
        counts = np.bincount(part.astype(np.int64), minlength=256)
        assert abs(counts - len(numbers) / 256).max() < 6 * (len(numbers) / 256) ** 0.5
