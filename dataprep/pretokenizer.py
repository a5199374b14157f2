"""Pre-tokenisers as tables: a `Split` pattern of a tokenizer.json becomes a small automaton over classes of characters.

A pattern is a list of alternatives, tried in order, of greedy repeats, groups and sets of characters, with a look at
the next character (`\\s+(?!\\S)`). Which characters a set holds is asked of the `tokenizers` library itself, set by
set, so that the tables follow the library's version of Unicode. The automaton has one state per *ordered* list of
places in the pattern: what comes first in it is what a backtracking matcher would try first.
"""

import functools
import re
from typing import Any, Literal, NamedTuple

import numpy as np
from tokenizers import Regex, pre_tokenizers

CODE_POINTS = 0x110000
SURROGATES = range(0xD800, 0xE000)
MOST_STATES = 1 << 12
MOST_REPEATS = 64
BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # GPT-2's, built in
FOLDED_PAIRS = ("ss", "st", "ff", "fi", "fl")  # one character can match both letters if case does not count


class Unsupported(Exception):
    """The tables cannot express this tokeniser; the message says what they cannot."""


class Scanner(NamedTuple):
    """A pattern as tables. States are multiples of `width`, the number of classes + 1 (the end of the text).

    classes: uint8[CODE_POINTS], a character's class. steps: int32[states * width]; at `state + class` stands the next
    state << 1, | 1 if the pattern may end before this character. State 0 is the dead one, `width` the first.
    """

    classes: np.ndarray
    steps: np.ndarray
    width: int


@functools.cache
def known_characters() -> tuple[str, np.ndarray]:
    """Characters to ask about, and their code points: all of planes 0 to 3 and 14, the ends of the uniform others."""
    points = [
        point
        for plane in range(17)
        for point in range(plane << 16, plane + 1 << 16)
        if point not in SURROGATES and (plane in (0, 1, 2, 3, 14) or point & 0xFFFF >= 0xFFFD)
    ]
    return "".join(map(chr, points)), np.array(points)


@functools.cache
def members(source: str) -> np.ndarray:
    """bool[CODE_POINTS]: which characters the library's regular expressions take for one of the set `source`."""
    result = np.zeros(CODE_POINTS, bool)
    if len(source) == 1:
        result[ord(source)] = True
        return result
    runs = pre_tokenizers.Split(Regex(f"(?:{source})+"), "removed", invert=True)
    text, points = known_characters()
    if re.fullmatch(r"\(\?i:[a-z']\)", source):
        points = points[: 1 << 15]  # no character beyond has the same letter in the other case
    found = np.zeros(len(points), bool)
    for start in range(0, len(points), 1 << 16):
        for _, (a, b) in runs.pre_tokenize_str(text[start : start + (1 << 16)]):
            found[start + a : start + b] = True
    result[points] = found
    for plane in (*range(4, 14), 15, 16):
        result[plane << 16 : (plane + 1 << 16) - 2] = result[(plane + 1 << 16) - 3]
    result[SURROGATES] = result[0xFFFD]  # they do not occur in UTF-8, and need no class of their own
    return result


class Node(NamedTuple):
    """A part of a pattern. kind: set (of characters `source`), ahead, not_ahead (the same), all, any, repeat.

    nullable: whether it can match without a character.
    """

    kind: Literal["set", "ahead", "not_ahead", "all", "any", "repeat"]
    nullable: bool
    source: str = ""
    parts: tuple["Node", ...] = ()
    least: int = 0
    most: int | None = None


class Parser:
    """A recursive-descent parser of the patterns named above; Unsupported for any other."""

    ESCAPE = re.compile(r"\\(?:[pP]\{\^?\w+\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[sSdwrntfv]|[^\w\s])")
    SET = re.compile(rf"\[\^?(?:{ESCAPE.pattern}|[^\\\[\]&]|&(?!&))+\]")
    REPEAT = re.compile(r"[?*+]|\{(\d+)(,?)(\d*)\}")

    def __init__(self, pattern: str):
        self.pattern, self.at = pattern, 0

    def parse(self) -> Node:
        node = self.alternatives(False)
        if self.at < len(self.pattern):
            raise self.error("an unmatched bracket")
        return node

    def error(self, what: str) -> Unsupported:
        return Unsupported(f"its pattern has {what} at ...{self.pattern[self.at : self.at + 20]!r}")

    def take(self, text: str) -> bool:
        found = self.pattern.startswith(text, self.at)
        self.at += len(text) * found
        return found

    def alternatives(self, fold: bool) -> Node:
        options = [self.sequence(fold)]
        while self.take("|"):
            options.append(self.sequence(fold))
        return Node("any", any(part.nullable for part in options), parts=tuple(options))

    def sequence(self, fold: bool) -> Node:
        parts: list[Node] = []
        letters = ""
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            begin = self.at
            part = self.atom(fold)
            text = self.pattern[begin : self.at]
            letters += text if len(text) == 1 else "|"
            parts.append(self.repeated(part))
        if fold and any(pair in letters.lower() for pair in FOLDED_PAIRS):
            raise self.error("letters that one character matches")
        return Node("all", all(part.nullable for part in parts), parts=tuple(parts))

    def atom(self, fold: bool) -> Node:
        if self.take("(?!") or self.take("(?="):
            kind: Any = "not_ahead" if self.pattern[self.at - 1] == "!" else "ahead"
            inner = self.atom(fold)
            if inner.kind != "set" or not self.take(")"):
                raise self.error("a look at more than one character")
            return Node(kind, True, inner.source)
        if self.take("("):
            fold = self.take("?i:") or (fold and self.take("?:")) or (self.take("?:") and False)
            if self.pattern.startswith("?", self.at):
                raise self.error("a special group")
            inner = self.alternatives(fold)
            if not self.take(")"):
                raise self.error("an unmatched bracket")
            return inner
        match = self.ESCAPE.match(self.pattern, self.at) or self.SET.match(self.pattern, self.at)
        if not match and self.pattern[self.at] in "\\[]{}()^$.*+?":
            raise self.error("something else than sets, literals and repeats")
        source = match.group() if match else self.pattern[self.at]
        self.at += len(source)
        if fold and not source.isascii():
            raise self.error("letters beyond ASCII whose case does not count")
        return Node("set", False, f"(?i:{source})" if fold else source)

    def repeated(self, node: Node) -> Node:
        match = self.REPEAT.match(self.pattern, self.at)
        if not match:
            return node
        self.at = match.end()
        if self.pattern[self.at : self.at + 1] in ("?", "+", "*", "{"):
            raise self.error("a lazy or possessive repeat")
        sign = match.group()
        if sign in ("?", "*", "+"):
            least, most = (1 if sign == "+" else 0), (1 if sign == "?" else None)
        else:
            least = int(match[1])
            most = least if not match[2] else (int(match[3]) if match[3] else None)
        if max(least, most or 0) > MOST_REPEATS or node.nullable:
            raise self.error("a repeat of something empty, or too many")
        return Node("repeat", least == 0, parts=(node,), least=least, most=most)


def sources(node: Node) -> set[str]:
    """The sets of characters in a node."""
    return {node.source} - {""} | {source for part in node.parts for source in sources(part)}


Thread = tuple[()] | tuple[Node, "Thread"]  # what is still to be matched: a node, then another thread; () = nothing


def step(threads: tuple[Thread, ...], held: frozenset[str]) -> tuple[tuple[Thread, ...], bool]:
    """(threads behind the next character, whether they match before it); held: the sets it is in.

    Threads that come after a match are dropped: a backtracking matcher would have been content with it.
    """
    todo, seen, following = list(reversed(threads)), set[Thread](), dict[Thread, None]()
    while todo:
        thread = todo.pop()
        if thread in seen:
            continue
        seen.add(thread)
        if not thread:
            return tuple(following), True
        node, after = thread
        if node.kind == "set":
            if node.source in held:
                following[after] = None
        elif node.kind == "all":
            for part in reversed(node.parts):
                after = (part, after)
            todo.append(after)
        elif node.kind == "any":
            todo += [(part, after) for part in reversed(node.parts)]
        elif node.kind == "repeat":
            if node.least == 0:
                todo.append(after)
            if node.most != 0:
                again = node._replace(least=max(0, node.least - 1), most=None if node.most is None else node.most - 1)
                todo.append((node.parts[0], (again, after)))
        elif (node.source in held) == (node.kind == "ahead"):
            todo.append(after)
    return tuple(following), False


@functools.cache
def compile_pattern(pattern: str) -> Scanner:
    """The tables of a pattern that matches at least one character. Unsupported if it is of another kind."""
    node = Parser(pattern).parse()
    sets = sorted(sources(node))
    if len(sets) > 63:
        raise Unsupported("its pattern has too many sets of characters")
    signature = np.zeros(CODE_POINTS, np.uint64)
    for bit, source in enumerate(sets):
        signature |= members(source).astype(np.uint64) << np.uint64(bit)
    runs = np.flatnonzero(np.diff(signature, prepend=~signature[0]))  # few: neighbours are alike
    signatures, kinds = np.unique(signature[runs], return_inverse=True)
    if len(signatures) > 255:
        raise Unsupported("its pattern tells too many kinds of characters apart")
    classes = np.repeat(kinds, np.diff(runs, append=CODE_POINTS))
    held = [frozenset(s for bit, s in enumerate(sets) if value >> bit & 1) for value in signatures.tolist()]
    held.append(frozenset())  # the end of the text is in no set
    width = len(held)
    found: list[tuple[Thread, ...]] = [((node, ()),)]
    states = {(): 0, found[0]: width}
    steps: list[int] = [0] * width
    for threads in found:  # it grows meanwhile
        for row in held:
            following, matched = step(threads, row)
            if following not in states:
                states[following] = len(states) * width
                found.append(following)
            steps.append(states[following] << 1 | matched)
        if len(states) > MOST_STATES:
            raise Unsupported("its pattern needs too many states")
    if any(step & 1 for step in steps[width : 2 * width]):
        raise Unsupported("its pattern matches the empty text")
    return Scanner(classes.astype(np.uint8), np.array(steps, np.int32), width)


def leaves_nothing_out(scanner: Scanner) -> bool:
    """Whether the pattern matches somewhere at every character, so that no text lies between matches."""
    width, steps = scanner.width, scanner.steps
    return all((steps[(steps[width + c] >> 1) : (steps[width + c] >> 1) + width] & 1).all() for c in range(width - 1))


def compile_pre_tokenizer(description: dict[str, Any] | None) -> list[Scanner]:
    """The scanners of a tokenizer.json's `pre_tokenizer`, to be applied one inside the other.

    They cut the text; what no match covers is a piece of its own. Unsupported says what else it does.
    """
    parts = (description or {}).get("pretokenizers", [description or {}])
    if not parts or parts[-1].get("type") != "ByteLevel":
        raise Unsupported("its pre-tokeniser does not end in ByteLevel")
    scanners = []
    for part in parts[:-1]:
        if part["type"] != "Split":
            raise Unsupported(f"its pre-tokeniser has a {part['type']}")
        pattern = part["pattern"].get("Regex") or re.sub(r"([^\w\s])", r"\\\1", part["pattern"]["String"])
        scanner = compile_pattern(pattern)
        kept = part["behavior"] == "Removed" and part["invert"] and leaves_nothing_out(scanner)
        if part["behavior"] != "Isolated" and not kept:
            raise Unsupported(f"its pre-tokeniser splits with behaviour {part['behavior']}")
        scanners.append(scanner)
    if parts[-1]["add_prefix_space"]:
        raise Unsupported("its pre-tokeniser adds a space before the text")
    return [*scanners, compile_pattern(BYTE_LEVEL)] if parts[-1].get("use_regex", True) else scanners
