"""Inventories against loops over the documents."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from dataprep.storage import UserError
from mixer.config import CLASSES, TIERS
from mixer.exclude import load_exclude
from mixer.inventory import add_inventories, take_inventory
from tests.mixer.corpus import NOBODY, config, corpus, partition

MIX = config(
    {"tokens": 1, "context": 100}, {"tokens": 1, "context": 100, "long_documents": "drop"},
    {"tokens": 1, "context": 100, "long_documents": "truncate"}, held_out={"fraction": 0.3},
)  # fmt: skip


def test_joins_and_sums_like_a_loop():
    part = partition(7, [1, 49, 50, 149, 150, 400, *range(1, 300)])
    table, sums = take_inventory(*part, MIX, NOBODY)
    kept = part.dedup["keep"].to_pylist()
    tiers, lengths = part.quality["tier"].to_pylist(), part.tokens["n_tokens"].to_pylist()
    expected = [i for i in range(len(kept)) if kept[i]]
    assert table["row"].to_pylist() == expected
    assert table["doc"].to_pylist() == [(7 << 40) + i for i in expected]
    documents, tokens, usable = Counter(), Counter(), Counter()
    for row in table.to_pylist():
        i, n = row["row"], lengths[row["row"]]
        length_class = "short" if n < 50 else "medium" if n < 150 else "long"
        assert (row["n_tokens"], row["source"]) == (n, "web")
        assert (TIERS[row["tier"]], CLASSES[row["length_class"]]) == (tiers[i], length_class)
        key = ("web", tiers[i], length_class, row["held_out"])
        documents[key] += 1
        tokens[key] += n
        usable[key] += np.array([n, n if n <= 100 else 0, min(n, 100)])
    assert len(sums["cells"]) == len(documents) > 12
    for cell in sums["cells"]:
        key = (cell["source"], cell["tier"], cell["length_class"], cell["held_out"])
        assert (cell["documents"], cell["tokens"]) == (documents[key], tokens[key])
        assert cell["usable"] == list(usable[key])
        places, *columns = cell["pieces"]
        assert cell["exact"] and places == sorted(set(places)) and len(places) >= documents[key]
        assert [sum(column) for column in columns] == cell["usable"]
    assert 0.2 < np.mean(table["held_out"].to_numpy()) < 0.4
    lost = [n for n, keep in zip(lengths, kept, strict=True) if not keep]
    assert sums["removed"]["duplicate"] == {"documents": len(lost), "tokens": sum(lost)}


def test_a_cluster_is_held_out_as_a_whole():
    part = partition(1, [10] * 300, duplicates=0)
    clusters = np.arange(300, dtype=np.uint64) // 3
    dedup = part.dedup.set_column(2, "cluster", pa.array(clusters))
    held_out = take_inventory(part.documents, dedup, *part[2:], MIX, NOBODY)[0]["held_out"].to_numpy()
    assert 0 < held_out.sum() < 300
    assert (held_out.reshape(100, 3).sum(axis=1) % 3 == 0).all()


def test_exclude_takes_document_numbers_owners_ids_and_hashes(tmp_path):
    part = partition(3, [10] * 40, duplicates=0)
    hashes = part.documents["content_hash"].to_pylist()
    file = tmp_path / "takedown.txt"
    lines = f"doc:{(3 << 40) + 5}\n web-3-6 \n\n{hashes[7].hex().upper()}\nnobody\n{(3 << 40) + 8}\n"
    file.write_bytes(b"\xef\xbb\xbf" + lines.encode())  # a number alone is an owner's id, and here nobody's
    table, sums = take_inventory(*part, MIX, load_exclude(str(file)))
    assert sums["exclude_lines"] == sorted([f"doc:{(3 << 40) + 5}", "web-3-6", hashes[7].hex().upper()])
    assert sorted(set(range(40)) - set(table["row"].to_pylist())) == [5, 6, 7]
    assert sums["removed"]["excluded"] == {"documents": 3, "tokens": 30}
    with pytest.raises(UserError, match="no file"):
        load_exclude(str(tmp_path / "absent"))
    for content in (b"\xff\xfe", None):
        broken = tmp_path / "broken"
        broken.mkdir() if content is None else broken.write_bytes(content)
        with pytest.raises(UserError, match="broken cannot be read"):
            load_exclude(str(broken))
        broken.rmdir() if content is None else broken.unlink()


def test_sums_do_not_depend_on_the_partitions_order_and_add_up():
    parts = [take_inventory(*part, MIX, NOBODY)[1] for part in corpus()]
    total = add_inventories(parts)
    assert total == add_inventories(reversed(parts))
    assert total == add_inventories([add_inventories(parts[:2]), add_inventories(parts[2:])])
    assert sum(c["tokens"] for c in total["cells"]) == sum(c["tokens"] for p in parts for c in p["cells"])
    assert total["removed"]["duplicate"]["documents"] + sum(c["documents"] for c in total["cells"]) == 1600


def test_tables_of_other_documents_and_unknown_tiers_are_refused():
    part, other = partition(1, [10] * 5), partition(2, [10] * 5)
    with pytest.raises(UserError, match="the quality table has other documents"):
        take_inventory(part.documents, part.dedup, other.quality, part.tokens, MIX, NOBODY)
    odd = part.quality.set_column(1, "tier", pa.array(["low", "top", "low", "low", "low"]))
    with pytest.raises(UserError, match="tier 'top'"):
        take_inventory(part.documents, part.dedup, odd, part.tokens, MIX, NOBODY)


def test_an_empty_partition_is_no_special_case():
    table, sums = take_inventory(*partition(1, []), MIX, NOBODY)
    assert len(table) == 0 and sums["cells"] == [] and add_inventories([sums])["cells"] == []
