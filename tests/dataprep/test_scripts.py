"""The script of texts, against a count letter by letter."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataprep import scripts
from dataprep.scripts import SCRIPTS, scripts_of, table
from tests.dataprep.hostile import TEXTS

EXAMPLES = {
    "Latin": "Ein Text, 123 漢字",
    "Cyrillic": "Текст на русском, a b c",
    "Han": "这是中文文本 text",
    "Kana": "これはひらがなとカタカナです 漢字",
    "Devanagari": "हिन्दी में",
    "Arabic": "نص عربي",
    "other": "ᏣᎳᎩ",
    "no letters": "123 ... \n",
}


@pytest.mark.parametrize("script", EXAMPLES)
def test_examples(script: str) -> None:
    assert scripts_of(pa.array(["", EXAMPLES[script]], pa.large_string())[1:]).to_pylist() == [script]


@given(st.lists(TEXTS, max_size=4), st.integers(1, 30))
def test_the_script_of_most_of_the_first_letters(texts: list[str], letters: int) -> None:
    expected = []
    for text in texts:
        codes = [int(table()[ord(char)]) for char in text]
        first = [code for code in codes if code][:letters]
        expected.append(SCRIPTS[min(first, key=lambda code: (-first.count(code), code), default=0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts, "LETTERS", letters)
        assert scripts_of(pa.array(texts, pa.large_string())).to_pylist() == expected
