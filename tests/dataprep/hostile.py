"""Text that breaks tokenisers: marks, separators, unassigned and rare characters, and pieces of English."""

import random

from hypothesis import strategies as st

ALPHABET = (
    "aAbzZsStTreREvemMlLdD''''’   \n\n\r\t/"
    "\x0b\x0c\x1c\x1f\x85\xa0\u1680\u180e\u2000\u2009\u200b\u2028\u2029\u202f\u3000"
    "\ufeff"
    '0123²½٣०Ⅷ㊿!?.,;:_-+<>|$€#@(){}[]\\"&*^`~\x00\x01\x7fé\u0301\u0323\u0308\u0327\u093c\u0345\u0334\u05b4\u0e34\u0e48'
    "ſKßİıŉǅʰªΩώ가\u1100\u1161\u11a8क\u0928\u09c7\u09be\u0bc6\u0bbeกับ漢字かカ\uf900\ufb01\ufb1dأש\u200d\ufe0f🙂👩🏽\u0378\u05ff"
    "\u2fe0\ue000\uffff\U00010400\U0001d15e\U00020000\U0002f800\U00031350\U00040000\U000e0001\U000e0100\U000fffff\U0010ffff"
)
TEXTS = st.one_of(
    st.text(st.sampled_from(ALPHABET), max_size=30),
    st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(ALPHABET)), max_size=30),
)


def characters(count: int, seed: int) -> str:
    """Random characters, two thirds of them from anywhere in Unicode."""
    rng = random.Random(seed)
    ranges = [(0, 0xD800), (0xE000, 0x110000), (0, 128)]
    return "".join(chr(rng.randrange(*ranges[k % 3])) for k in range(count))
