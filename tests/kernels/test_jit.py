"""The kernels' cache: outside the package, and the same for every copy of the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
CALL = (
    "import numpy as np\n"
    "from kernels.best_fit import best_fit\n"
    "best_fit(np.array([3, 2]), 4)\n"
    "stats = [d.stats for d in vars(__import__('kernels.best_fit').best_fit).values() if hasattr(d, 'stats')]\n"
    "print(sum(sum(s.cache_hits.values()) for s in stats), sum(sum(s.cache_misses.values()) for s in stats))\n"
)


def call(checkout: Path, cache: Path) -> tuple[int, int]:
    """(cache hits, misses) of a process that runs a kernel in this checkout."""
    run = subprocess.run(
        [sys.executable, "-c", CALL],
        cwd=checkout,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    hits, misses = map(int, run.stdout.split())
    return hits, misses


def test_a_copy_of_the_checkout_finds_the_compiled_kernels(tmp_path):
    for name in ("one", "two"):
        shutil.copytree(CHECKOUT / "kernels", tmp_path / name / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    assert call(tmp_path / "one", tmp_path / "cache")[1] > 0
    hits, misses = call(tmp_path / "two", tmp_path / "cache")
    assert hits > 0 and misses == 0
    assert not list(tmp_path.glob("*/kernels/**/*.nb?"))
    with open(tmp_path / "two" / "kernels" / "words.py", "a") as file:
        file.write("\n")
    assert call(tmp_path / "two", tmp_path / "cache")[1] > 0  # any change of any kernel file makes all anew


def test_an_unwritable_home_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    shutil.copytree(CHECKOUT / "kernels", tmp_path / "kernels")
    assert call(tmp_path, tmp_path / "file")[1] > 0
