"""The floors of docs/architecture.md: who may import whom, and that no script hides a standard module."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
OURS = {"kernels", "dataprep", "dedup", "mixer", "trainer", "jobs", "benchmarks", "tests"}
MAY_IMPORT = {
    "kernels": (set(), {"ray"}),
    "dataprep": ({"kernels", "dataprep"}, {"ray", "torch"}),
    "dedup": ({"kernels", "dataprep.storage", "dedup"}, {"ray", "torch"}),
    "mixer": ({"kernels", "dataprep.storage", "mixer"}, {"ray", "torch"}),
    "trainer": (
        {"kernels", "dataprep.storage", "mixer.batches", "mixer.cache", "mixer.reader", "mixer.shards", "trainer"},
        {"ray"},
    ),
    "jobs": ({"kernels", "dataprep", "dedup", "mixer", "trainer", "jobs"}, {"torch"}),
}


def imports(file: Path) -> set[str]:
    """The dotted modules a file imports anywhere in it, `from a import b` counted as a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_floors(folder):
    allowed, forbidden = MAY_IMPORT[folder]
    files = list((CHECKOUT / folder).glob("*.py"))
    assert files
    for file in files:
        for module in imports(file):
            top = module.split(".")[0]
            assert top not in forbidden, f"{file.name} imports {module}"
            known = top not in OURS or (module == "kernels.jit" and folder == "kernels")
            in_kernels = folder == "kernels" and top == "kernels"
            assert known or in_kernels or any(module == a or module.startswith(a + ".") for a in allowed), (
                f"{folder}/{file.name} may not import {module}"
            )


def test_lower_floors_load_without_ray_and_torch():
    """Every module of the lower floors, imported where importing ray or torch is an error."""
    code = (
        "import sys, importlib, pathlib\n"
        "sys.modules['ray'] = sys.modules['torch'] = None\n"
        "for folder in ('kernels', 'dataprep', 'dedup', 'mixer'):\n"
        "    for file in sorted(pathlib.Path(folder).glob('*.py')):\n"
        "        if file.stem not in GPU: importlib.import_module(f'{folder}.{file.stem}'.removesuffix('.__init__'))\n"
        "assert sys.modules['torch'] is None\n"
    )
    gpu = {
        f.stem
        for f in (CHECKOUT / "kernels").glob("*.py")
        if {"torch", "triton"} & {m.split(".")[0] for m in imports(f)}
    }
    run = subprocess.run(
        [sys.executable, "-c", f"GPU = {gpu!r}\n{code}"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_empty_package_files():
    for folder in MAY_IMPORT:
        assert (CHECKOUT / folder / "__init__.py").read_text() == ""


def test_no_script_bears_a_standard_modules_name():
    for file in (CHECKOUT / "jobs").glob("*.py"):
        assert file.stem not in sys.stdlib_module_names


def jobs_with_scripts() -> list[str]:
    return sorted(f.stem for f in (CHECKOUT / "jobs").glob("*.py") if "__main__" in f.read_text())


@pytest.mark.parametrize("how", ["script", "module"])
def test_every_job_runs_as_script_and_as_module(how, tmp_path):
    """`jobs/dedup.py` as a script would hide the package `dedup` from itself; here each job must import it."""
    jobs = jobs_with_scripts()
    assert {"corpus", "dedup", "quality", "tokens", "mix", "train", "export", "pipeline"} <= set(jobs)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    runs = {}
    for job in jobs:
        command = [f"{CHECKOUT}/jobs/{job}.py"] if how == "script" else ["-m", f"jobs.{job}"]
        folder = tmp_path if how == "script" else CHECKOUT
        runs[job] = subprocess.Popen(
            [sys.executable, *command, "no-such-file.yaml"],
            cwd=folder,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
    for job, run in runs.items():
        _, error = run.communicate(timeout=120)
        assert (run.returncode, error.strip()) == (1, "error: no configuration file no-such-file.yaml"), job
