"""Packing: speed, padding and balance, with peers in the same run. `python -m benchmarks.packing`.

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
BATCHES = ((64, 8), (256, 8), (256, 64), (1024, 8), (1024, 64))  # sequences, ranks


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


def measure(context: int, sigma: float, windows: int) -> tuple[dict[str, float], np.ndarray]:
    """(documents/s of `arrange`, of one core's CPU time; padding; documents cut that fit), cost of each sequence."""
    seconds = documents = sequences = packed = cut = 0
    costs = []
    for seed in range(windows + 1):  # the first warms up
        lengths = document_lengths(context, sigma, seed)
        drawn = window_of(lengths, pa.nulls(len(lengths), pa.large_binary()), seed)
        took, (item, segments) = timed(lambda: arrange(drawn, lengths, stage(context), "split", seed))  # noqa: B023
        if seed:
            seconds += took
            documents += len(lengths)
            pieces = np.bincount(item, minlength=len(lengths))
            cut += int((pieces[lengths <= context] != 1).sum())
            costs.append(np.bincount(segments["sequence"], segments["length"].astype(np.float64) ** 2))
            sequences += len(costs[-1])
            packed += int(lengths.sum())
    figures = {"documents_s": documents / seconds, "padding": 1 - packed / (sequences * context), "cut": cut}
    return figures, np.concatenate(costs)


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


def greedy_concatenation(lengths: np.ndarray, context: int) -> np.ndarray:
    """Documents one after the other, cut at every `context` tokens: which of those that fit are cut."""
    ends = np.cumsum(lengths)
    return ((ends - lengths) // context != (ends - 1) // context) & (lengths <= context)


def peers(context: int, sigma: float, documents: int) -> dict[str, float]:
    """On the same pieces: documents/s of both packers; part of the fitting documents that concatenation cuts."""
    lengths = document_lengths(context, sigma, 0)[:documents]
    pieces = np.minimum(lengths, context)
    taken, bins = timed(lambda: best_fit(pieces, context))
    theirs, other_bins = timed(lambda: segment_tree_best_fit(pieces, context))
    loads, other_loads = (np.sort(np.bincount(b, pieces)) for b in (bins, other_bins))
    return {
        "best_fit": len(lengths) / taken,
        "segment_tree": len(lengths) / theirs,
        "same_bins": np.array_equal(loads, other_loads),
        "concatenation_cuts": float(greedy_concatenation(lengths, context).sum() / (lengths <= context).sum()),
    }


def balance(costs: np.ndarray, batch: int, ranks: int) -> tuple[float, float, float, float]:
    """Cost of a rank's slice over the mean of its batch: p50, p99, largest; and mean over largest, averaged."""
    slices = costs[: len(costs) // batch * batch].reshape(-1, ranks, batch // ranks).sum(axis=2)
    slices = slices / slices.mean(axis=1, keepdims=True)
    p50, p99 = np.quantile(slices, (0.5, 0.99))
    return float(p50), float(p99), float(slices.max()), float((1 / slices.max(axis=1)).mean())


def print_balance(costs: np.ndarray) -> dict[str, float]:
    """costs: in training order. Prints them as dealt and shuffled; returns the part of its time that a rank is busy."""
    orders = {"dealt": costs, "shuffled": costs[np.random.default_rng(0).permutation(len(costs))]}
    busy, rows = {}, []
    for batch, ranks in BATCHES:
        if len(costs) >= 2 * batch:
            for name, order in orders.items():
                p50, p99, largest, part = balance(order, batch, ranks)
                rows.append((f"{batch} on {ranks}, {name}", f"{p50:.3f} / {p99:.3f} / {largest:.2f}", f"{part:.0%}"))
                busy[f"busy_{name}_{batch}x{ranks}"] = part
    table("a rank's slice over the mean of its batch", ("batch on ranks", "p50 / p99 / max", "ranks busy"), rows)
    return busy


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
        row, costs = measure(context, sigma, 2 if arguments.quick else 8)
        peer = peers(context, sigma, 10_000 if arguments.quick else 40_000)
        alone = (f"{peer[packer] / 1e6:.2f} M/s" for packer in ("best_fit", "segment_tree"))
        bins, cuts = "the same" if peer["same_bins"] else "OTHER BINS", f"{peer['concatenation_cuts']:.1%}"
        rows.append(
            (name, f"{row['documents_s'] / 1e6:.2f} M", f"{row['padding']:.4%}", row["cut"], *alone, bins, cuts)
        )
        figures |= print_balance(costs) if name == "8k" else {}
        figures[f"padding_{name}"], figures[f"documents_s_{name}"] = row["padding"], row["documents_s"]
        figures["truncated_fitting"] += row["cut"]
    columns = (
        "documents/s",
        "padding",
        "fitting cut",
        "best fit alone",
        "segment tree",
        "bins",
        "cut by concatenation",
    )
    table("packing", ("context", *columns), rows)
    figures["documents_s"] = figures["documents_s_8k"]
    figures["peak_gb_1m"] = peak_memory(*CONTEXTS["1m"])
    report(arguments.json, figures)


if __name__ == "__main__":
    main()
