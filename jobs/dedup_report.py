"""What the dedup job tells a person: losses by source, the clusters behind an alarm, why one document was removed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dataprep import manifest
from dataprep.storage import Commit, UserError, add_up, join, read_table
from dedup import explain, report
from jobs.corpus import documents
from jobs.tables import Table


@dataclass(frozen=True)
class Found:
    """What deduplication would remove. signed: by corpus partition. removed, clusters: tables in `verdicts`."""

    root: str
    signed: list[Commit]
    verdicts: Commit

    def worst_clusters(self, sums: report.Aggregates) -> list[str]:
        """One line for each of the ten clusters that take most near duplicates from the source that loses most."""
        source = report.worst_loss(sums)[1]
        files = [e.file for e in manifest.load(join(self.root, "manifest.jsonl")) if e.source == source]
        removed = read_table(self.verdicts.path("removed"), ["doc", "reason", "jaccard", "cluster"])
        lost = removed.filter(pc.equal(removed["reason"].cast(pa.string()), "near"))
        file_of = pc.shift_right(lost["doc"], pa.scalar(40, pa.uint64()))
        lost = lost.filter(pc.is_in(file_of, pa.array(files, pa.uint64())))
        sizes = lost.group_by("cluster").aggregate([("doc", "count"), ("doc", "min"), ("jaccard", "min")])
        sizes = sizes.sort_by([("doc_count", "descending"), ("cluster", "ascending")]).slice(0, 10).to_pylist()
        texts = documents(self.root, {row[name] for row in sizes for name in ("cluster", "doc_min")})
        return [
            f"  {row['doc_count']:,} like {describe(texts[row['cluster']])}\n"
            f"    at Jaccard {row['jaccard_min']:.2f} and more, such as {describe(texts[row['doc_min']])}"
            for row in sizes
        ]

    def explanation(self, doc: int) -> Iterator[str]:
        """What `--explain` prints, line by line."""
        texts = documents(self.root, {doc}) if 0 <= doc < 1 << 64 else {}
        if doc not in texts:
            raise UserError(
                f"there is no document {doc}; the column `doc` of the corpus and of `clusters` has the numbers"
            )
        yield f"document {describe(texts[doc])}, source {texts[doc]['source']}"
        removed = read_table(self.verdicts.path("removed"))
        number = pa.scalar(doc, pa.uint64())
        row = next(iter(removed.filter(pc.equal(removed["doc"], number)).to_pylist()), None)
        if row is None:
            followers = removed.filter(pc.equal(removed["keeper"], number))
            yield f"is kept; documents removed as its duplicates: {len(followers):,}"
            return
        keeper = documents(self.root, {row["keeper"]})[row["keeper"]]
        copy = "an exact copy" + (" of a near duplicate" if row["jaccard"] < 1 else "")
        kind = copy if row["reason"] == "exact" else "a near duplicate"
        yield f"is removed as {kind} (Jaccard {row['jaccard']:.4f}) of"
        yield f"document {describe(keeper)}, source {keeper['source']}, which is kept"
        places = list(explain.differences(texts[doc]["text"], keeper["text"]))
        yield f"the first {len(places)} places where their words differ:" if places else "their words are the same"
        for before, ours, theirs, after in places:
            yield f"  {before} [-{ours}-] {{+{theirs}+}} {after}"


def describe(row: dict[str, Any]) -> str:
    return f"{row['doc']} ({explain.printable(row['origin'])}: {explain.excerpt(row['text'])})"


def losses(sums: report.Aggregates) -> Table:
    """What every source loses, and all of them."""
    rows = []
    for source, reasons in [*sorted(sums.items()), ("all", add_up(sums.values()))]:
        documents, size = ({r: reasons.get(r, {}).get(u, 0) for r in report.REASONS} for u in ("documents", "bytes"))
        near = documents["near"] / max(1, documents["near"] + documents["kept"])
        counts = [documents[reason] for reason in ("exact", "near", "kept")]
        rows.append([source, sum(documents.values()), *counts, near, sum(size.values()), size["kept"]])
    columns = "source, documents:count, exact:count, near:count, kept:count, lost to near:share, MB:MB, MB kept:MB"
    return Table("Removed and kept", columns, rows)
