"""Why a document was removed, for a person: where two texts differ, text safe for a terminal."""

import difflib
from collections.abc import Iterator, Sequence

MOST_WORDS = 20_000  # of the parts that differ: beyond, whole lines are compared
CONTEXT, MOST_SHOWN = 6, 40  # words around a differing place, words of it
SHARED, MOST_CHARACTERS = 20, 1000  # of what is alike in two long words, of a place in all


def printable(text: str) -> str:
    """The text with everything escaped that could move, hide or colour what a terminal shows."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def excerpt(text: str, length: int = 100) -> str:
    """The beginning of a text on one line."""
    words = " ".join(text[: 4 * length].split())
    return printable(words[:length]) + ("..." if len(words) > length or len(text) > 4 * length else "")


def differences(one: str, other: str, most: int = 10) -> Iterator[tuple[str, str, str, str]]:
    """(before, of one, of the other, after) at the first `most` places where the words of two texts differ."""
    for a, b in ((one.split(), other.split()), (one.splitlines(), other.splitlines())):
        start = _alike(a, b)
        end = _alike(a[start:][::-1], b[start:][::-1])
        a_differs, b_differs = a[start : len(a) - end], b[start : len(b) - end]
        if max(len(a_differs), len(b_differs)) <= MOST_WORDS:
            break
    matcher = difflib.SequenceMatcher(None, a_differs[:MOST_WORDS], b_differs[:MOST_WORDS])
    places = [code for code in matcher.get_opcodes() if code[0] != "equal"]
    for _, i, j, k, n in places[:most]:
        before, after = a[max(0, start + i - CONTEXT) : start + i], a[start + j : start + j + CONTEXT]
        yield _show(before), *_trim(_show(a_differs[i:j]), _show(b_differs[k:n])), _show(after)


def _alike(a: Sequence[str], b: Sequence[str]) -> int:
    """How many elements two sequences share at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _show(words: list[str]) -> str:
    text = " ".join(word[:MOST_CHARACTERS] for word in words[:MOST_SHOWN])[:MOST_CHARACTERS]
    return printable(text) + (" ..." if len(words) > MOST_SHOWN else "")


def _trim(one: str, other: str) -> tuple[str, str]:
    """Both without most of what they begin and end with alike: a paragraph in Chinese is a single word."""
    for _ in range(2):
        cut = _alike(one, other) - SHARED
        if cut > 0:
            one, other = "..." + one[cut:], "..." + other[cut:]
        one, other = one[::-1], other[::-1]
    return one, other
