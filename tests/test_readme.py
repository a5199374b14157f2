"""The README's file tree is the project's: every file, with its own first line."""

import ast
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "dataprep", "dedup", "mixer", "trainer", "jobs", "benchmarks")


def listing() -> str:
    lines = []
    for folder in FOLDERS:
        lines.append(f"{folder}/")
        for file in sorted((CHECKOUT / folder).glob("*.py")):
            if file.name != "__init__.py":
                first = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n")[0]
                lines.append(f"    {file.name:24}{first}")
    return "\n".join(lines)


def test_the_tree_lists_every_file_with_its_first_line():
    assert listing() in (CHECKOUT / "README.md").read_text(), f"the README's tree should be\n{listing()}"
