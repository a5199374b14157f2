"""The Gopher kernel against a plain reference that follows its definitions word by word."""

import math
import re
from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import example, given
from hypothesis import strategies as st

from dataprep.storage import array_buffers
from kernels.gopher import ALONE, BULLETS, CONTENT, LETTER, MARK, SIGNALS, STOP_WORDS, character_class, signals


def has(char: str, bits: int) -> bool:
    return bool(character_class(char) & bits)


def split_words(text: str) -> list[str]:
    words = []
    for run in text.split():
        word = ""
        for char in run:
            if word and (has(char, ALONE) or (has(word[0], ALONE) and not has(char, MARK))):
                words.append(word)
                word = ""
            word += char
        words.append(word)
    return words


def duplicates(texts: list[str]) -> tuple[float, int]:
    seen: set[tuple[str, ...]] = set()
    count = characters = 0
    for text in texts:
        words = tuple(split_words(text))
        if words in seen:
            count += 1
            characters += len(text)
        seen.add(words)
    return count / len(texts), characters


def top_ngram(words: list[str], n: int) -> int:
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    most = max(counts.values(), default=0)
    return max((c * len(" ".join(gram)) for gram, c in counts.items() if c == most), default=0) if most > 1 else 0


def duplicate_ngrams(words: list[str], n: int) -> int:
    seen = set()
    i = characters = 0
    while i + n <= len(words):
        gram = tuple(words[i : i + n])
        if gram in seen:
            characters += len("".join(gram))
            i += n
        else:
            seen.add(gram)
            i += 1
    return characters


def reference(text: str) -> dict[str, float]:
    words = split_words(text)
    out = dict.fromkeys(SIGNALS, 0.0) | {"characters": len(text)}
    if not words:
        return out
    content = [w for w in words if any(has(c, CONTENT) for c in w)]
    split = [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
    lines = [line for line in split if line]
    # The paragraph's text as it stands, blank lines told by what they hold, not by their width.
    pieces = [*re.split(r"(\r\n|\r|\n)", text), ""]
    paragraphs = [""]
    for line, end in zip(pieces[::2], pieces[1::2], strict=True):
        if line.strip():
            paragraphs[-1] += line + end
        else:
            paragraphs.append("")
    paragraphs = [p.strip() for p in paragraphs if p.strip()]

    out["words"] = len(content)
    out["mean_word_length"] = sum(map(len, content)) / max(1, len(content))
    out["hash_ratio"] = text.count("#") / len(words)
    out["ellipsis_ratio"] = (text.count("...") + text.count("…")) / len(words)
    out["bullet_lines"] = sum(line[0] in BULLETS for line in lines) / len(lines)
    out["ellipsis_lines"] = sum(line.endswith(("...", "…")) for line in lines) / len(lines)
    out["letter_words"] = sum(any(has(c, LETTER) for c in w) for w in words) / len(words)
    ascii_lower = {re.sub("[A-Z]", lambda m: m[0].lower(), w) for w in words}
    out["stop_words"] = len(ascii_lower & set(STOP_WORDS))
    out["diversity"] = math.log(len(set(words))) / math.log(len(words)) if len(words) > 1 else 1.0
    out["unique_words"] = len(set(words)) / len(words)
    for name, blocks in (("paragraph", paragraphs), ("line", lines)):
        share, characters = duplicates(blocks)
        out[f"duplicate_{name}s"] = share
        out[f"duplicate_{name}_characters"] = characters / len(text)
    for n in (2, 3, 4):
        out[f"top_{n}gram"] = top_ngram(words, n) / len(text)
    for n in range(5, 11):
        out[f"duplicate_{n}gram"] = duplicate_ngrams(words, n) / len(text)
    return out


def measure(texts: list[str]) -> np.ndarray:
    return signals(*array_buffers(pa.array(texts, pa.large_string())))


def check(texts: list[str]) -> None:
    want = np.array([[reference(t)[name] for name in SIGNALS] for t in texts]).reshape(len(texts), len(SIGNALS))
    np.testing.assert_allclose(measure(texts), want, rtol=1e-6, atol=0)


WORDS = ["a", "b", "c", "the", "OF", "To", "have", "haved", "x.", "...", "…", "....", "#", "-", "•x", "12"]
WORDS += ["漢", "漢字。", "กิน", "é", "e\u0301", "𝔘𝔫", "\u200b", "🙂", "\U000e0001"]
SPACES = [" ", "  ", "\t", "\u3000", "\u2028", "\n", "\r\n", "\r", "\n\n", "\n \n", "\r\n\r\n", ". ", ""]
repetitive = st.lists(st.tuples(st.sampled_from(WORDS[:3]), st.sampled_from([" ", "\n"])), max_size=80)
mixed = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(SPACES)), max_size=40)
documents = st.one_of(repetitive, mixed).map(lambda pairs: "".join(a + b for a, b in pairs))


@given(st.lists(st.one_of(documents, st.text(max_size=30)), max_size=4))
@example(["spam " * 3000, "a\n" * 1000, "漢" * 500, "the end\n\nthe end"])
def test_signals_equal_the_reference(texts: list[str]) -> None:
    check(texts)


@given(documents, st.integers(2, 4))
def test_repeated_documents(text: str, times: int) -> None:
    check([text * times, (text + "\n\n") * times, text + " x " + text])


def test_values_by_hand() -> None:
    text = "- the cat and the dog ...\n- the cat and the dog ...\n\nend."
    row = dict(zip(SIGNALS, measure([text])[0], strict=True))
    line = len("- the cat and the dog ...")
    assert row["characters"] == len(text)
    assert row["words"] == 11  # neither the bullets nor the dots
    assert row["stop_words"] == 2
    assert row["bullet_lines"] == row["ellipsis_lines"] == np.float32(2 / 3)
    assert row["duplicate_lines"] == np.float32(1 / 3)
    assert row["duplicate_line_characters"] == np.float32(line / len(text))
    assert row["duplicate_paragraphs"] == 0
    assert row["top_4gram"] == np.float32(2 * len("the cat and the") / len(text))
    assert row["duplicate_5gram"] == np.float32(len("-thecatandthe") / len(text))
    assert row["duplicate_7gram"] == np.float32(len("-thecatandthedog...") / len(text))
    assert row["duplicate_8gram"] == 0
