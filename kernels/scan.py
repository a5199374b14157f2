"""Where texts are cut before pairs are merged: automata over classes of characters, one inside the other's pieces."""

from typing import Any, NamedTuple

import numpy as np

from kernels.jit import njit


class Scanners(NamedTuple):
    """Automata, one inside the other (as `dataprep.pretokenizer` makes them), state 0 of all being the dead one.

    classes: uint8[scanners, code points]. steps: int32, next state << 1 | match. first, width: int64[scanners].
    """

    classes: np.ndarray
    steps: np.ndarray
    first: np.ndarray
    width: np.ndarray


def as_arrays(scanners: list[Any]) -> Scanners:
    """Several automata with tables (classes, steps, width) of their own as one `Scanners`."""
    steps = [np.zeros(0, np.int32)]
    first, base = [], 0
    for one in scanners:
        state = one.steps >> 1
        steps.append((np.where(state == 0, 0, state + base) << 1 | one.steps & 1).astype(np.int32))
        first.append(base + one.width)
        base += len(one.steps)
    classes = np.stack([s.classes for s in scanners]) if scanners else np.zeros((0, 1), np.uint8)
    widths = np.array([s.width for s in scanners], np.int64)
    return Scanners(classes, np.concatenate(steps), np.array(first, np.int64), widths)


@njit(forceinline=True)
def _match(data, i, end, classes, steps, first, width):
    """Where the match that begins at data[i] ends, or -1 where none does. data is valid UTF-8."""
    state, last = first, np.int64(-1)
    while i < end:
        code, size = np.int64(data[i]), 1
        if code >= 0x80:
            if code < 0xE0:
                code, size = (code & 0x1F) << 6 | (data[i + 1] & 0x3F), 2
            elif code < 0xF0:
                code, size = (code & 0xF) << 12 | np.int64(data[i + 1] & 0x3F) << 6 | (data[i + 2] & 0x3F), 3
            else:
                code = (code & 7) << 18 | np.int64(data[i + 1] & 0x3F) << 12
                code, size = code | np.int64(data[i + 2] & 0x3F) << 6 | (data[i + 3] & 0x3F), 4
        step = np.int64(steps[state + classes[code]])
        last = i if step & 1 else last
        state = step >> 1
        if state == 0:
            return last
        i += size
    return end if steps[state + width - 1] & 1 else last


@njit(forceinline=True)
def _cut(data, i, end, classes, steps, first, width):
    """Where the piece that begins at data[i] ends: a match, or all up to the next one."""
    found = _match(data, i, end, classes, steps, first, width)
    while found < 0:
        i += 1
        while i < end and data[i] & 0xC0 == 0x80:
            i += 1
        if i == end or _match(data, i, end, classes, steps, first, width) >= 0:
            found = i
    return found


@njit
def pieces(data, scanners, level, begins, stops, ends):
    """Where the next pieces of a text end, as many as `ends` holds: (how many, level).

    level, begins, stops: how far the scanners are; at first 0, the text's start in begins[0], its end in stops[0]
    (both int64[at least one, scanners]). No pieces are left when none are found. Pieces leave no gaps.
    """
    last = max(0, len(scanners.first) - 1)
    count = 0
    while level >= 0 and count < len(ends):
        i, end = begins[level], stops[level]
        if i == end:
            level -= 1
            continue
        if len(scanners.first) == 0:
            i = ends[0] = end
            count = 1
        else:
            classes, steps = scanners.classes[level], scanners.steps
            first, width = scanners.first[level], scanners.width[level]
            if level < last:
                begins[level] = _cut(data, i, end, classes, steps, first, width)
                level += 1
                begins[level], stops[level] = i, begins[level - 1]
                continue
            while i < end and count < len(ends):
                i = _cut(data, i, end, classes, steps, first, width)
                ends[count] = i
                count += 1
        begins[level] = i
    return count, level
