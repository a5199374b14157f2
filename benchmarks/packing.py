"""Packing: speed and padding, with a peer in the same run. `python -m benchmarks.packing`.

Log-normal lengths with a mean of 1,500 tokens, the tail heavier for long contexts; documents over the context are
split. A window is 64 million tokens, and at 1M as many as 256 sequences hold.
"""

import resource

import numpy as np
import pyarrow as pa

from benchmarks.common import about, parser, report, table, timed
from kernels.best_fit import best_fit
from mixer.config import CLASSES, TIERS
from mixer.draw import DRAWN
from mixer.pack import arrange, pack_window
from mixer.shards import StageInfo

CONTEXTS = {"8k": (8 << 10, 1.3), "128k": (128 << 10, 1.8), "1m": (1 << 20, 2.2)}  # context, sigma of log lengths
WINDOW = 64_000_000


def document_lengths(context: int, sigma: float, seed: int) -> np.ndarray:
    """A window of documents of 1,500 tokens on average, at most 16 million; that its last sequence is full is luck."""
    rng = np.random.default_rng(seed)
    tokens = max(WINDOW, 256 * context) + rng.integers(context)
    draws = rng.lognormal(np.log(1500) - sigma**2 / 2, sigma, 2 * tokens // 1500)
    lengths = np.clip(draws, 1, 1 << 24).astype(np.int64)
    return lengths[: np.searchsorted(np.cumsum(lengths), tokens)]


def window_of(lengths: np.ndarray, ids: pa.Array, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    n = len(lengths)
    columns = [np.zeros(n), rng.integers(0, 1 << 62, n), np.arange(n), np.zeros(n), *(np.zeros(n) for _ in range(4))]
    arrays = [pa.array(column).cast(field.type) for column, field in zip(columns, DRAWN, strict=False)]
    return pa.table([*arrays, ids], schema=DRAWN)


def stage(context: int) -> StageInfo:
    return StageInfo("stage", 0, context, 1e4, 1, 200_000, 0, "uint32", ("source",), TIERS, CLASSES, "t", "p", 1)


def measure(context: int, sigma: float, windows: int) -> dict[str, float]:
    """documents/s of `arrange`, of one core's CPU time; padding; documents cut that fit."""
    seconds = documents = sequences = packed = cut = 0
    for seed in range(windows + 1):  # the first warms up
        lengths = document_lengths(context, sigma, seed)
        drawn = window_of(lengths, pa.nulls(len(lengths), pa.large_binary()), seed)
        took, (item, segments) = timed(lambda: arrange(drawn, lengths, stage(context), "split", seed))  # noqa: B023
        if seed:
            seconds += took
            documents += len(lengths)
            pieces = np.bincount(item, minlength=len(lengths))
            cut += int((pieces[lengths <= context] != 1).sum())
            sequences += int(segments["sequence"].max()) + 1
            packed += int(lengths.sum())
    return {"documents_s": documents / seconds, "padding": 1 - packed / (sequences * context), "cut": cut}


def segment_tree_best_fit(lengths: np.ndarray, context: int) -> list[int]:
    """Best-fit decreasing as TRL packs: a segment tree over the spaces left says which space fits best."""
    size = 1 << context.bit_length()
    tree = [0] * (2 * size)  # the largest space below each node
    with_space: list[list[int]] = [[] for _ in range(context + 1)]

    def update(space: int) -> None:
        node = size + space
        tree[node] = space if with_space[space] else 0
        while node > 1:
            node >>= 1
            tree[node] = max(tree[2 * node], tree[2 * node + 1])

    with_space[context].append(0)
    update(context)
    bins, opened = [0] * len(lengths), 1
    for item in np.argsort(-lengths, kind="stable").tolist():
        length, node = int(lengths[item]), 1
        while node < size:  # the leftmost leaf that is large enough
            node = 2 * node if tree[2 * node] >= length else 2 * node + 1
        space = node - size
        bin_ = with_space[space].pop()
        if space == context:
            with_space[context].append(opened)
            opened += 1
        elif not with_space[space]:
            update(space)
        bins[item] = bin_
        with_space[space - length].append(bin_)
        if len(with_space[space - length]) == 1 and space > length:
            update(space - length)
    return bins


def packers(context: int, sigma: float, documents: int) -> tuple[float, float, bool]:
    """Documents/s of both packers on the same pieces, and whether they fill the same bins."""
    pieces = np.minimum(document_lengths(context, sigma, 0)[:documents], context)
    ours, bins = timed(lambda: best_fit(pieces, context))
    theirs, other_bins = timed(lambda: segment_tree_best_fit(pieces, context))
    loads, other_loads = (np.sort(np.bincount(b, pieces)) for b in (bins, other_bins))
    return len(pieces) / ours, len(pieces) / theirs, np.array_equal(loads, other_loads)


def peak_memory(context: int, sigma: float) -> float:
    """GB that this process held at most, having packed a window of 32-bit ids last."""
    lengths = document_lengths(context, sigma, 0)
    ends = 4 * np.concatenate([[0], np.cumsum(lengths)])
    data = pa.py_buffer(np.ones(ends[-1] // 4, np.uint32))
    ids = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(lengths), [None, pa.py_buffer(ends), data])
    pack_window(window_of(lengths, ids, 0), stage(context), "split", 0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    arguments = parser(__doc__, reads_corpus=False).parse_args()
    print(f"one thread, its CPU time; {about()}")
    print(f"takes {'20 s' if arguments.quick else 'about a minute'} and 4 GB of memory")
    figures: dict[str, float] = {"truncated_fitting": 0}
    rows = []
    for name, (context, sigma) in CONTEXTS.items():
        found = measure(context, sigma, 2 if arguments.quick else 8)
        *alone, same = packers(context, sigma, 10_000 if arguments.quick else 40_000)
        speeds = (f"{speed / 1e6:.2f} M" for speed in (found["documents_s"], *alone))
        rows.append((name, *speeds, "the same" if same else "OTHER BINS", f"{found['padding']:.4%}", found["cut"]))
        figures |= {f"padding_{name}": found["padding"], f"documents_s_{name}": found["documents_s"]}
        figures["truncated_fitting"] += found["cut"]
    columns = ("context", "documents/s", "best fit alone", "segment tree", "bins", "padding", "fitting documents cut")
    table("packing", columns, rows)
    figures |= {"documents_s": figures["documents_s_8k"], "peak_gb_1m": peak_memory(*CONTEXTS["1m"])}
    report(arguments.json, figures)


if __name__ == "__main__":
    main()
