"""Deduplication's recall and precision on labelled text: `python -m benchmarks.dedup_quality --corpus DIR`.

The truth is every pair of documents of a source with its exact Jaccard similarity, by brute force over the shingle
sets that verification uses. A true pair is resolved if at most one of its two documents is kept.
"""

import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zstandard

from benchmarks import dedup_corpus
from dataprep.storage import array_buffers, read_table
from dedup import candidates, keepers, verify
from dedup.config import DedupConfig
from dedup.signatures import signatures
from jobs import corpus, dedup
from jobs.engine import Engine
from kernels.jit import njit
from kernels.words import reference_words

LEAST = 0.5  # similarity of the least alike pairs in the truth
THRESHOLDS = np.round(np.arange(0.5, 0.96, 0.05), 2)
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


@njit
def all_pairs(tokens, offsets, posting_offsets, postings, least):
    """(a, b, Jaccard) of all pairs of sets with at least `least`, by counting what each shares with all before it.

    tokens, offsets: the sets; postings: for each token the sets that hold it, ascending, from posting_offsets on.
    """
    a, b, similarity = np.empty(1024, np.int64), np.empty(1024, np.int64), np.empty(1024)
    found = 0
    shared = np.zeros(len(offsets) - 1, np.int64)
    for x in range(len(offsets) - 1):
        for i in range(offsets[x], offsets[x + 1]):
            for p in range(posting_offsets[tokens[i]], posting_offsets[tokens[i] + 1]):
                if postings[p] >= x:
                    break
                shared[postings[p]] += 1
        size = offsets[x + 1] - offsets[x]
        for y in range(x):
            jaccard = shared[y] / max(1, size + offsets[y + 1] - offsets[y] - shared[y])
            shared[y] = 0
            if jaccard >= least:
                if found == len(a):
                    a, b = np.concatenate((a, a)), np.concatenate((b, b))
                    similarity = np.concatenate((similarity, similarity))
                a[found], b[found], similarity[found] = y, x, jaccard
                found += 1
    return a[:found], b[:found], similarity[:found]


def load(engine: Engine, config: dedup_corpus.Config) -> dict[str, Source]:
    """Run the jobs, then find every source's truth."""
    verdicts = dedup.build(engine, config)
    parts = zip(corpus.partitions(engine, config), verdicts, strict=True)
    tables: dict[str, list[tuple[pa.Table, pa.Table]]] = defaultdict(list)
    for partition, verdict in parts:
        documents = read_table(partition.documents, ["doc", "source", "id", "text", "content_hash"])
        tables[documents["source"][0].as_py()].append((documents, read_table(verdict.path("dedup"))))
    return {name: find_truth(pieces, config.dedup) for name, pieces in tables.items()}


def find_truth(pieces: list[tuple[pa.Table, pa.Table]], config: DedupConfig) -> Source:
    documents = pa.concat_tables([d for d, _ in pieces], promote_options="default").unify_dictionaries()
    sets = verify.shingle_sets(documents, documents["doc"].to_numpy(), config).combine_chunks()
    data, offsets = array_buffers(sets["shingles"])
    offsets = offsets // 8
    values, tokens = np.unique(data.view(np.uint64)[offsets[0] : offsets[-1]], return_inverse=True)
    owners = np.repeat(np.arange(len(documents), dtype=np.int32), np.diff(offsets))
    postings = owners[np.argsort(tokens, kind="stable")]
    posting_offsets = np.concatenate([[0], np.cumsum(np.bincount(tokens, minlength=len(values)))])
    a, b, similarity = all_pairs(tokens, offsets - offsets[0], posting_offsets, postings, LEAST)
    return Source(documents, pa.concat_tables([v for _, v in pieces]), sets, a, b, similarity)


def precision(found: dict[str, Source], threshold: float) -> tuple[int, int, int]:
    """(right, all, keeper violations) of the removals; every similarity computed anew from the texts."""
    verdicts = pa.concat_tables([s.verdicts for s in found.values()])
    documents = pa.concat_tables([s.documents.select(["doc", "text"]) for s in found.values()])
    sets = pa.concat_tables([s.sets for s in found.values()])
    removed = verdicts.filter(pc.invert(verdicts["keep"]))
    docs = {doc: row for row, doc in enumerate(documents["doc"].to_pylist())}
    kept = set(verdicts.filter(verdicts["keep"])["doc"].to_pylist())
    pairs = list(
        zip(removed["doc"].to_pylist(), removed["keeper"].to_pylist(), removed["reason"].to_pylist(), strict=True)
    )
    by_hand = set(range(0, len(pairs), max(1, len(pairs) // BY_HAND)))
    right = 0
    for number, (doc, keeper, reason) in enumerate(pairs):
        rows = docs[doc], docs[keeper]
        one, other = (np.frombuffer(sets["shingles"][row].as_py(), np.uint64) for row in rows)
        shared = len(np.intersect1d(one, other, assume_unique=True))
        union = len(one) + len(other) - shared
        good = shared >= threshold * union
        if union == 0 or number in by_hand:
            texts = [documents["text"][row].as_py() for row in rows]
            same = texts[0].replace("\r\n", "\n").replace("\r", "\n") == texts[1].replace("\r\n", "\n").replace(
                "\r", "\n"
            )
            good = same if union == 0 and reason == "exact" else good and plain_jaccard(*texts) >= threshold
        right += good
    return right, len(pairs), sum(keeper not in kept for _, keeper, _ in pairs)


def plain_jaccard(one: str, other: str, n: int = 5) -> float:
    """The same similarity over sets of strings, with no kernel and no hash."""
    sets = []
    for text in (one, other):
        words = list(reference_words(text, "verification"))
        sets.append({tuple(words[i : i + n]) for i in range(len(words) - n + 1)})
    return len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))


def labels(directory: Path, name: str, source: Source) -> dict[str, tuple[int, int]]:
    """By the labels, (right, all): `given` pairs of 0.85 and more resolved, removals `within` their cluster."""
    rows = {name: row for row, name in enumerate(source.documents["id"].to_pylist())}
    keep = source.verdicts["keep"].to_numpy()
    found = {}
    for path in directory.glob(f"exact_jaccard/{name}.pairs.tsv*"):
        pairs = [(r[0], r[1]) for r in read_tsv(path) if float(r[2]) >= 0.85]
        found["given"] = sum(not (keep[rows[a]] and keep[rows[b]]) for a, b in pairs), len(pairs)
    for path in directory.glob(f"{name}.clusters.tsv"):
        cluster = {rows[r[0]]: r[1] for r in read_tsv(path)}
        doc = {d: row for row, d in enumerate(source.documents["doc"].to_pylist())}
        removed = [row for row in np.flatnonzero(~keep).tolist() if row in cluster]
        keeper = source.verdicts["keeper"].to_pylist()
        within = sum(cluster[row] == cluster.get(doc.get(keeper[row], -1)) for row in removed)
        found["within"] = within, len(removed)
    return found


def read_tsv(path: Path) -> list[list[str]]:
    data = path.read_bytes()
    if path.suffix == ".zst":
        data = zstandard.ZstdDecompressor().stream_reader(data).read()
    return [line.split("\t") for line in data.decode().splitlines()[1:]]


def curve(found: dict[str, Source], config: DedupConfig) -> dict[str, list[float]]:
    """Name -> recall at each of THRESHOLDS: of true pairs at or above the threshold, and of those 0.05 above it."""
    recalls: dict[str, list[list[float]]] = {"at the threshold": [], "0.05 above it": []}
    for source in found.values():
        signed = signatures(source.documents, config)
        pairs = candidates.pairs(candidates.bucket_rows(signed))
        exact, near = pairs.filter(pairs["exact"]), pairs.filter(pc.invert(pairs["exact"]))
        near = verify.verify(near, source.sets, source.sets, float(THRESHOLDS[0]))
        by_threshold = []
        for threshold in THRESHOLDS:
            removed = keepers.choose(exact, near.filter(pc.greater_equal(near["jaccard"], threshold)), signed)
            keep = pc.invert(pc.is_in(source.documents["doc"], removed["doc"].combine_chunks())).to_numpy()
            by_threshold.append([source.recall(keep, threshold), source.recall(keep, threshold + 0.05)])
        for place, name in enumerate(recalls):
            recalls[name].append(
                [row[place][0] / row[place][1] if row[place][1] >= 20 else 1.0 for row in by_threshold]
            )
    return {
        f"{which}, {kind}": merge(np.array(rows), axis=0).tolist()
        for kind, rows in recalls.items()
        for which, merge in (("mean of the sources", np.mean), ("worst source", np.min))
    }


def draw(lines: dict[str, list[float]], path: str) -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams |= {"svg.hashsalt": "", "svg.fonttype": "none", "font.size": 9}
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel="dedup.threshold (Jaccard similarity)", ylabel="share of true pairs resolved")
    for (name, values), style in zip(lines.items(), ("C0-", "C0--", "C1-", "C1--"), strict=True):
        axes.plot(THRESHOLDS, values, style, marker=".", label=name)
    axes.axhline(0.97, color="0.7", linewidth=0.8)
    axes.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = dedup_corpus.parser(__doc__)
    parser.add_argument("--figure", help="draw recall over thresholds there (SVG; needs matplotlib)")
    arguments = parser.parse_args()
    directory = Path(arguments.corpus) / "labels"
    files = dedup_corpus.sources(arguments.corpus)
    labelled = {name: path for name, path in files.items() if list(directory.glob(f"exact_jaccard/{name}.pairs*"))}
    if arguments.quick:
        labelled = dict(list(labelled.items())[:4])
    print(f"{len(labelled)} sources, {dedup_corpus.about()}; takes about a minute (--quick: 10 s)")
    with tempfile.TemporaryDirectory() as root:
        config = dedup_corpus.configuration(root, labelled, workers=0)
        with Engine(root, 0) as engine:
            found = load(engine, config)
    threshold = config.dedup.threshold
    print(f"\n{'source':32} documents removed  true pairs >=.80 recall  >=.85 recall   given truth  within cluster")
    worst, resolved, true = 1.0, 0, 0
    for name, source in sorted(found.items()):
        keep = source.verdicts["keep"].to_numpy()
        at, above = source.recall(keep, threshold), source.recall(keep, 0.85)
        told = labels(directory, name, source)
        columns = [f"{n:6}/{of:<6}" if of else " " * 13 for n, of in (told.get(k, (0, 0)) for k in ("given", "within"))]
        print(
            f"{name:32} {len(keep):9} {int((~keep).sum()):7} {at[1]:16} {share(at):6.4f} {above[1]:6} "
            f"{share(above):6.4f} {columns[0]} {columns[1]}"
        )
        worst, resolved, true = min(worst, share(above)), resolved + above[0], true + above[1]
    right, removed, violations = precision(found, threshold)
    figures = {
        "recall_085": worst,
        "recall_085_all": resolved / max(1, true),
        "precision": right / max(1, removed),
        "keeper_violations": violations,
        "removed": removed,
    }
    print(f"\nrecall_085 is the worst source's; {figures}")
    if arguments.figure:
        lines = curve(found, config.dedup)
        for name, values in lines.items():
            print(f"{name:40} " + " ".join(f"{t:.2f}:{v:.3f}" for t, v in zip(THRESHOLDS, values, strict=True)))
        draw(lines, arguments.figure)
    dedup_corpus.save(arguments.json, figures)


def share(part: tuple[int, int]) -> float:
    return part[0] / part[1] if part[1] else 1.0


if __name__ == "__main__":
    main()
