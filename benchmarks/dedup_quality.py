"""Deduplication's recall and precision on labelled text: `python -m benchmarks.dedup_quality --corpus DIR`.

The truth is every pair of documents of a source with its exact Jaccard similarity, by brute force over the shingle
sets that verification uses. A true pair is resolved if at most one of its two documents is kept.
"""

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import csr_array

from benchmarks import common
from dataprep.storage import array_buffers, read_table
from dedup import candidates, keepers, verify
from dedup.config import DedupConfig
from dedup.signatures import signatures
from jobs import corpus, dedup
from jobs.config import Config
from jobs.engine import Engine
from kernels.words import reference_words

LEAST = 0.5  # similarity of the least alike pairs in the truth
THRESHOLDS = np.round(np.arange(0.5, 0.96, 0.05), 2)
ROWS = 1000  # of a block of the matrix of what sets share
BY_HAND = 300  # removals checked from their text by plain Python besides


@dataclass
class Source:
    """One source's documents with their verdicts (row by row), and the true pairs: rows a, b and their similarity."""

    documents: pa.Table
    verdicts: pa.Table
    sets: pa.Table
    a: np.ndarray
    b: np.ndarray
    similarity: np.ndarray

    def recall(self, keep: np.ndarray, least: float) -> tuple[int, int]:
        """(resolved, all) of the true pairs that are at least this similar."""
        true = self.similarity >= least
        return int((~(keep[self.a] & keep[self.b]))[true].sum()), int(true.sum())


def all_pairs(sets: csr_array, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, Jaccard) of all pairs of rows with at least `least`, a before b. sets: 1 where a row has an element."""
    sizes, found = np.diff(sets.indptr), []
    for first in range(0, sets.shape[0], ROWS):
        shared = (sets[first : first + ROWS] @ sets[: first + ROWS].T).tocoo()
        a, b = shared.col, shared.row + first
        jaccard = shared.data / (sizes[a] + sizes[b] - shared.data)
        found.append(np.stack([a, b, jaccard])[:, (a < b) & (jaccard >= least)])
    a, b, jaccard = np.concatenate(found, axis=1)
    return a.astype(np.int64), b.astype(np.int64), jaccard


def load(engine: Engine, config: Config) -> dict[str, Source]:
    """Run the jobs, then find every source's truth."""
    verdicts, partitions = dedup.build(engine, config), corpus.partitions(engine, config)
    names = ["doc", "source", "id", "text", "content_hash"]
    found = {}
    for source in sorted({partition.source for partition in partitions}):
        here = [number for number, partition in enumerate(partitions) if partition.source == source]
        documents = concatenated(read_table(partitions[number].documents, names) for number in here)
        verdict = concatenated(read_table(verdicts[number].path("dedup")) for number in here)
        found[source] = find_truth(documents, verdict, config.dedup)
    return found


def concatenated(tables: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="default").unify_dictionaries()


def find_truth(documents: pa.Table, verdicts: pa.Table, config: DedupConfig) -> Source:
    sets = verify.shingle_sets(documents, documents["doc"].to_numpy(), config).combine_chunks()
    data, offsets = array_buffers(sets["shingles"])
    offsets = offsets // 8
    _, elements = np.unique(data.view(np.uint64)[offsets[0] : offsets[-1]], return_inverse=True)
    rows = csr_array((np.ones(len(elements), np.int32), elements, offsets - offsets[0]))
    return Source(documents, verdicts, sets, *all_pairs(rows, LEAST))


def precision(found: dict[str, Source], threshold: float) -> tuple[int, int, int]:
    """(right, all, keeper violations) of the removals: by the truth, and where that says nothing, and for some
    BY_HAND more, from the texts."""
    true: dict[tuple[int, int], float] = {}
    for source in found.values():
        a, b = (source.documents["doc"].to_numpy()[rows].tolist() for rows in (source.a, source.b))
        true |= dict(zip(zip(a, b, strict=True), source.similarity.tolist(), strict=True))
    documents = pa.concat_tables([s.documents.select(["doc", "text"]) for s in found.values()])
    row = {doc: number for number, doc in enumerate(documents["doc"].to_pylist())}
    verdicts = concatenated([s.verdicts for s in found.values()])
    kept = set(verdicts.filter(verdicts["keep"])["doc"].to_pylist())
    removed = verdicts.filter(pc.invert(verdicts["keep"])).select(["doc", "keeper"]).to_pylist()
    every, right = max(1, len(removed) // BY_HAND), 0
    for number, pair in enumerate(removed):
        similarity = true.get((min(pair.values()), max(pair.values())))
        if similarity is None or number % every == 0:
            one, other = (re.sub("\r\n?", "\n", documents["text"][row[doc]].as_py()) for doc in pair.values())
            similarity = 1.0 if one == other else plain_jaccard(one, other)
        right += similarity >= threshold
    return right, len(removed), sum(pair["keeper"] not in kept for pair in removed)


def plain_jaccard(one: str, other: str, n: int = 5) -> float:
    """The same similarity over sets of strings, with no kernel and no hash."""
    sets = []
    for text in (one, other):
        words = list(reference_words(text, "verification"))
        sets.append({tuple(words[i : i + n]) for i in range(len(words) - n + 1)})
    return len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))


def given(directory: Path, name: str, source: Source) -> tuple[int, int]:
    """(resolved, all) of the pairs of 0.85 and more that the labels name."""
    row = {name: number for number, name in enumerate(source.documents["id"].to_pylist())}
    keep = source.verdicts["keep"].to_numpy()
    (path,) = directory.glob(f"{name}.pairs.tsv*")
    with fsspec.open(path, "rt", compression="infer") as file:
        pairs = [line.split("\t") for line in file.read().splitlines()[1:]]
    resolved = [not (keep[row[a]] and keep[row[b]]) for a, b, similarity in pairs if float(similarity) >= 0.85]
    return sum(resolved), len(resolved)


def curve(found: dict[str, Source], config: DedupConfig) -> dict[str, list[float]]:
    """Name -> recall at each of THRESHOLDS: of true pairs at or above the threshold, and of those 0.05 above it."""
    recalls = np.ones((len(found), len(THRESHOLDS), 2))
    for row, source in enumerate(found.values()):
        signed = signatures(source.documents, config)
        pairs = candidates.pairs(candidates.bucket_rows(signed))
        exact, near = pairs.filter(pairs["exact"]), pairs.filter(pc.invert(pairs["exact"]))
        near = verify.verify(near, source.sets, source.sets, float(THRESHOLDS[0]))
        for column, threshold in enumerate(THRESHOLDS):
            removed = keepers.choose(exact, near.filter(pc.greater_equal(near["jaccard"], threshold)), signed)
            keep = pc.invert(pc.is_in(source.documents["doc"], removed["doc"].combine_chunks())).to_numpy()
            for kind, least in enumerate((threshold, threshold + 0.05)):
                resolved, true = source.recall(keep, least)
                recalls[row, column, kind] = resolved / true if true >= 20 else 1.0
    return {
        f"{which}, {name}": merge(recalls[:, :, kind], axis=0).tolist()
        for kind, name in enumerate(("at the threshold", "0.05 above it"))
        for which, merge in (("mean of the sources", np.mean), ("worst source", np.min))
    }


def draw(lines: dict[str, list[float]], path: Path) -> None:
    labels = {"xlabel": "dedup.threshold (Jaccard similarity)", "ylabel": "share of true pairs resolved"}
    with common.figure(path, 6, 3.4, **labels) as axes:
        for (name, values), style in zip(lines.items(), ("C0-", "C0--", "C1-", "C1--"), strict=True):
            axes.plot(THRESHOLDS, values, style, marker=".", label=name)
        axes.axhline(0.97, color="0.7", linewidth=0.8)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--figure", type=Path, help="draw recall over thresholds there (SVG; needs matplotlib)")
    arguments = parser.parse_args()
    directory = Path(arguments.corpus) / "labels/exact_jaccard"
    files = {n: path for n, path in common.sources(arguments.corpus).items() if list(directory.glob(f"{n}.pairs*"))}
    if arguments.quick:
        files = dict(list(files.items())[:4])
    print(f"{len(files)} sources, {common.about()}; takes about a minute (--quick: 10 s)")
    with tempfile.TemporaryDirectory() as root:
        config = common.configuration(root, files, workers=0)
        with Engine(root, 0) as engine:
            found = load(engine, config)
    threshold, lines = config.dedup.threshold, []
    worst, resolved, true = 1.0, 0, 0
    for name, source in found.items():
        keep = source.verdicts["keep"].to_numpy()
        at, above = source.recall(keep, threshold), source.recall(keep, 0.85)
        counts = [f"{of} {share((n, of)):.4f}" for n, of in (at, above, given(directory, name, source))]
        lines.append((name, len(keep), int((~keep).sum()), *counts))
        worst, resolved, true = min(worst, share(above)), resolved + above[0], true + above[1]
    kinds = (f"pairs >= {threshold:.2f}", "pairs >= 0.85", "given pairs >= 0.85")
    common.table("pairs, and the share that is resolved", ("source", "documents", "removed", *kinds), lines)
    right, removed, violations = precision(found, threshold)
    if arguments.figure:
        curves = curve(found, config.dedup)
        rows = [(name, *(f"{v:.3f}" for v in values)) for name, values in curves.items()]
        common.table("recall over thresholds", ("", *map(str, THRESHOLDS)), rows)
        draw(curves, arguments.figure)
    figures = {"recall_085": worst, "recall_085_all": resolved / max(1, true), "precision": right / max(1, removed)}
    common.report(arguments.json, figures | {"keeper_violations": violations, "removed": removed})


def share(part: tuple[int, int]) -> float:
    return part[0] / part[1] if part[1] else 1.0


if __name__ == "__main__":
    main()
