"""The packing benchmark's peer against the definition, and its figures on small windows."""

import json
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import packing
from kernels.best_fit import best_fit_reference


@given(st.lists(st.integers(1, 40), max_size=60), st.sampled_from([40, 64, 100]))
def test_the_segment_tree_fills_the_bins_of_the_definition(lengths, context):
    lengths = np.array(lengths, np.int64)
    loads = [
        np.bincount(pack(lengths, context), lengths) for pack in (packing.segment_tree_best_fit, best_fit_reference)
    ]
    assert sorted(loads[0]) == sorted(loads[1])


def test_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "CONTEXTS", {"8k": (512, 1.3), "1m": (4096, 2.2)})
    monkeypatch.setattr(packing, "WINDOW", 2_000_000)
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--json", str(tmp_path / "figures.json")])
    packing.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["truncated_fitting"] == 0 and 0 <= figures["padding_8k"] < 0.002 and figures["padding_1m"] < 0.01
    assert figures["documents_s"] > 0
    assert "OTHER BINS" not in capsys.readouterr().out
