"""The kernel of line, sentence and script signals against a plain reference in strings."""

import re
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dataprep.storage import array_buffers
from kernels.lines import BRACKETS, POLICIES, QUOTES, SCRIPTS, SIGNALS, STOPS, WIDE_STOPS, signals
from tests.kernels.test_gopher import split_words

ENDS = STOPS + WIDE_STOPS
END, CLOSING = f"[{re.escape(ENDS)}]", f"[{re.escape(ENDS + QUOTES + BRACKETS)}]*"
SENTENCE = re.compile(rf"(?={END}){CLOSING}[{WIDE_STOPS}]{CLOSING}|{END}{CLOSING}(?!\S)")


def lower(text: str) -> str:
    return re.sub("[A-Z]", lambda m: m[0].lower(), text)


def script(char: str) -> str:
    name = unicodedata.name(char, "")
    return next(s for s, names in SCRIPTS.items() if name.startswith(names))


def reference(text: str) -> dict[str, float]:
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    words = split_words(text)
    out = dict.fromkeys(SIGNALS, 0.0)
    out["curly_brackets"] = text.count("{") + text.count("}")
    out["lorem_ipsum"] = lower(text).count("lorem ipsum")
    letters = [script(c) for c in text if unicodedata.category(c)[0] == "L" and ord(c) < 0x40000]
    for name in SCRIPTS:
        out[f"script_{name}"] = letters.count(name) / max(1, len(letters))
    if not lines:
        return out
    sentences = [len(SENTENCE.findall(line)) for line in lines]
    closed = re.compile(f"[{re.escape(ENDS)}][{re.escape(QUOTES + BRACKETS)}]*$|[{re.escape(QUOTES)}]$")
    terminal = [bool(closed.search(line)) for line in lines]
    script_lines = ["javascript" in lower(line) for line in lines]
    policies = [any(p in lower(line) for p in POLICIES) for line in lines]
    kept = [
        good
        and not line.endswith(("...", "…"))
        and len(split_words(line)) >= 5
        and max(map(len, split_words(line))) <= 1000
        and not js
        and not policy
        for line, good, js, policy in zip(lines, terminal, script_lines, policies, strict=True)
    ]
    out["sentences"] = sum(sentences)
    out["newline_ratio"] = len(re.findall(r"\r\n|\r|\n", text)) / len(words)
    out["longest_word"] = max(map(len, words))
    out["c4_sentences"] = sum(s for s, k in zip(sentences, kept, strict=True) if k)
    shares = {
        "terminal_lines": terminal,
        "short_lines": [len(line) <= 30 for line in lines],
        "javascript_lines": script_lines,
        "policy_lines": policies,
        "c4_lines": kept,
    }
    return out | {name: sum(values) / len(lines) for name, values in shares.items()}


def measure(texts: list[str]) -> np.ndarray:
    return signals(*array_buffers(pa.array(texts, pa.large_string())))


def check(texts: list[str]) -> None:
    want = np.array([[reference(t)[name] for name in SIGNALS] for t in texts]).reshape(len(texts), len(SIGNALS))
    for k, name in enumerate(SIGNALS):
        np.testing.assert_allclose(measure(texts)[:, k], want[:, k], rtol=1e-6, atol=0, err_msg=name)


PARTS = [
    "a", "the end", "He ran", "Ja. Nein", "3.14", ".", "...", "…", "?!", '."', ".)", "”", "。", "！」", "漢字", "한국",
    "ش؟", "JavaScript", "java", "Terms of Use", "use cookies", "uses cookie", "Lorem Ipsum", "lorem", "{", "}", "ไทย",
    "x" * 31, "é",
]  # fmt: skip
SPACES = [" ", " ", "", "\n", "\r\n", "\r", "\n\n", "\u2028", "\u3000"]
documents = st.lists(st.tuples(st.sampled_from(PARTS), st.sampled_from(SPACES)), max_size=40).map(
    lambda pairs: "".join(a + b for a, b in pairs)
)


@given(st.lists(st.one_of(documents, st.text(max_size=30)), max_size=4))
@example(["one two three four five.\nOne two three four five...\n", "a" * 1001 + " b c d e."])
def test_signals_equal_the_reference(texts: list[str]) -> None:
    check(texts)


def test_values_by_hand() -> None:
    text = (
        'He said: "Go home now, please."\nThis page uses cookies. Read our policy.\nEnable JavaScript\n\nПривет {мир}\n'
    )
    row = dict(zip(SIGNALS, measure([text])[0].tolist(), strict=True))
    assert row["sentences"] == 3 and row["terminal_lines"] == 0.5 and row["short_lines"] == 0.5
    assert row["javascript_lines"] == row["policy_lines"] == row["c4_lines"] == 0.25 and row["c4_sentences"] == 1
    assert row["curly_brackets"] == 2 and row["longest_word"] == len("JavaScript")
    assert row["newline_ratio"] == np.float32(5 / 17)
    assert row["script_cyrillic"] + row["script_latin"] == pytest.approx(1) and row["script_han"] == 0
