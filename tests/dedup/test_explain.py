"""Where two texts differ, and text that is safe on a terminal."""

from hypothesis import given
from hypothesis import strategies as st

from dedup.explain import differences, excerpt, printable


def test_differing_places_come_with_what_is_around_them():
    one = "the quick brown fox jumps over the lazy dog and runs away into the deep dark forest"
    other = one.replace("brown", "red").replace("dark", "dark green")
    first, second = differences(one, other)
    assert first == ("the quick", "brown", "red", "fox jumps over the lazy dog")
    assert second == ("runs away into the deep dark", "", "green", "forest")
    assert list(differences(one, one.replace(" ", "\n"))) == []


def test_a_long_word_is_shown_where_it_differs():
    one = "".join(chr(0x4E00 + i) for i in range(900))
    ((_, ours, theirs, _),) = differences(one, one.replace(chr(0x4E00 + 500), "X"))
    assert chr(0x4E00 + 500) in ours and "X" in theirs and max(len(ours), len(theirs)) < 60


def test_huge_texts_are_compared_quickly():
    lines = [f"line {i} of many" for i in range(100_000)]
    other = ["another first line", *lines[1:-1], "another last line"]
    found = list(differences("\n".join(lines), "\n".join(other)))
    assert 1 <= len(found) <= 10 and "another" in found[0][2]


@given(st.text(), st.text())
def test_equal_words_have_no_differences_and_others_have(one, other):
    assert bool(list(differences(one, other))) == (one.split() != other.split())


@given(st.text())
def test_nothing_unprintable_is_shown(text):
    assert printable(text).isprintable() and excerpt(text).isprintable()


def test_what_colours_hides_or_turns_text_is_escaped():
    assert printable("a\x1b[31m\u202eb\0") == "a\\x1b[31m\\u202eb\\x00"
    assert printable("汉字 ação") == "汉字 ação"
