"""docs/shard-format.md: every snippet runs, one after the other, on a shard log, and gives what the log holds."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mixer.shards import STORED, StageInfo
from tests.mixer.log import SIZES, expected, stage, write_log

pytest.importorskip("polars")
pytest.importorskip("duckdb")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "shard-format.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_the_snippets(tmp_path, compression):
    info = stage(256, compression=compression)
    write_log(str(tmp_path), info)
    tokens, segments = expected(info)
    found = {"directory": str(tmp_path)}
    assert len(SNIPPETS) == 5
    for snippet in SNIPPETS:
        exec(snippet, found)
    assert found["stage"]["context"] == 256 and len(found["paths"]) == len(SIZES)
    assert found["documents"] == [
        tokens[0, s["start"] : s["start"] + s["length"]].tolist() for s in segments if s["sequence"] == 0
    ]
    assert np.array_equal(found["tokens"], tokens[: SIZES[0]])
    by_source = Counter()
    for s in segments:
        by_source[int(s["source"])] += int(s["length"])
    assert dict(found["by_source"].iter_rows()) == by_source
    copies = Counter(doc for doc, _ in {(int(s["doc"]), int(s["copy"])) for s in segments})
    assert [row[:2] for row in found["repeated"]] == sorted(copies.items(), key=lambda item: (-item[1], item[0]))[:10]
    assert found["state"] == {"plan": "plan", "stage": "main", "step": 2, "cursor": 8}
    assert np.array_equal(found["parts"][0].tokens, tokens[6:8])  # rank 2 of 3


def test_the_page_names_every_field():
    words = set(re.findall(r"`(\w+)`", PAGE.read_text()))
    assert {f.name for f in dataclasses.fields(StageInfo)} | set(STORED) <= words
