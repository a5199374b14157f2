"""All signals together and languages, on real kinds of text."""

import string

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dataprep.language import PIECES, SAMPLE, UNKNOWN, detect, identify, sample
from dataprep.signals import SIGNALS, signals

SENTENCES = {
    "en": "The old mill by the river has not turned its wheel for many years, but people still come to see it.",
    "de": "Die alte Mühle am Fluss hat ihr Rad seit vielen Jahren nicht mehr gedreht, doch die Leute kommen noch.",
    "fr": "Le vieux moulin au bord de la rivière ne tourne plus depuis des années, mais les gens viennent le voir.",
    "ru": "Старая мельница у реки уже много лет не вращает своё колесо, но люди всё ещё приходят посмотреть.",
    "zh": "河边的老磨坊已经很多年没有转动过水轮了，但是人们仍然来看它。",
    "ja": "川のそばの古い水車小屋は何年も回っていませんが、人々は今でも見に来ます。",
    "ko": "강가의 오래된 방앗간은 여러 해 동안 물레를 돌리지 않았지만 사람들은 여전히 보러 온다.",
    "he": "הטחנה הישנה ליד הנהר לא סובבה את הגלגל שלה כבר שנים רבות, אבל אנשים עדיין באים לראות אותה.",
    "no": "Den gamle møllen ved elven har ikke snudd hjulet sitt på mange år, men folk kommer fortsatt for å se den.",
}


def column(texts: list[str]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(texts, pa.large_string())])


@pytest.mark.parametrize("code", SENTENCES)
def test_languages_of_short_texts(code):
    languages, scores = identify(column([SENTENCES[code], SENTENCES[code] * 200]))
    assert languages.to_pylist() == [code, code] and (scores > 0.9).all()


def test_a_long_document_is_judged_by_pieces_from_all_of_it():
    text = SENTENCES["en"] * 20 + SENTENCES["ru"] * 300  # a licence on top
    data = np.frombuffer(text.encode(), np.uint8)
    assert len(sample(data, 0, len(data)).encode()) <= SAMPLE + PIECES
    assert detect(sample(data, 0, len(data)))[0] == "ru"
    assert sample(data, 0, len(data)).endswith(SENTENCES["ru"][-50:])


@pytest.mark.parametrize(
    "text", ["", " \n", "12 34", "\x00\x01\x1b", "🙂🙃", "\ufdd0\uffff", "x" * 10_000, "a\u0301" * 3000]
)
def test_texts_in_no_language(text):
    language, score = detect(sample(np.frombuffer(text.encode(), np.uint8), 0, len(text.encode())))
    assert (language == UNKNOWN and score == 0) or 0 < score <= 1


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=4))
def test_every_string_has_a_language_and_finite_signals(texts):
    languages, scores = identify(column(texts))
    assert all(l and set(l) <= set(string.ascii_lowercase) for l in languages.to_pylist())
    assert ((scores >= 0) & (scores <= 1)).all()
    found = signals(column(texts))
    assert tuple(found) == SIGNALS
    assert all(np.isfinite(v).all() for v in found.values())


def test_compression_is_that_of_zstd():
    texts = ["", "a", SENTENCES["en"] * 50, string.printable * 2]
    sizes = [len(zstandard.ZstdCompressor(level=1).compress(t.encode())) for t in texts]
    wanted = [size / len(t.encode()) if t else 0 for size, t in zip(sizes, texts, strict=True)]
    np.testing.assert_allclose(signals(column(texts))["compression"], wanted, rtol=1e-6)


def test_a_slice_is_measured_alone():
    texts = [*SENTENCES.values()]
    sliced, alone = signals(column(texts).slice(2, 3)), signals(column(texts[2:5]))
    for name in SIGNALS:
        np.testing.assert_array_equal(sliced[name], alone[name], name)
    assert identify(column(texts).slice(2, 3))[0].to_pylist() == list(SENTENCES)[2:5]
