"""A rehearsal of benchmarks.gpu without a GPU: every section runs through, so that none fails in a GPU's first run."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_every_section_runs_through_on_the_cpu(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu", "--device", "cpu", "--json"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [*command, tmp_path / "gpu.json"], capture_output=True, text=True, env=environment, timeout=500, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert {"lightning_error", "lightning_b2_ms", "varlen_ratio", "gated_norm_compiled_ms", "sort_ms"} <= {*figures}
    assert {f"vs_{peer}_model" for peer in ("plain", "torch", "transformers")} <= {*figures}
    assert "| `varlen_ratio` |" in (tmp_path / "gpu.md").read_text()
