"""The Python installation as a corpus: the right files under the right labels, in the same order everywhere."""

import json
import sysconfig

import pytest

from dataprep import python_installation
from dataprep.config import CorpusConfig, SourceConfig
from dataprep.manifest import list_inputs
from dataprep.python_installation import classify, description, identifier, list_files, roots
from dataprep.readers import Bad, Record, read_records


@pytest.mark.parametrize(
    ("path", "part"),
    {
        "site-packages/a-1.dist-info/METADATA": "readme",
        "site-packages/a/METADATA": None,
        "site-packages/a-1.dist-info/licenses/LICENSE": "licence",
        "site-packages/a-1.dist-info/LICENSE.APACHE": "licence",
        "site-packages/a/Licence.md": "licence",
        "site-packages/a/COPYING.txt": "licence",
        "site-packages/a/license.py": "code",
        "site-packages/a/license.png": None,
        "site-packages/a/guide.rst": "docs",
        "site-packages/a/tests/numbers.txt": None,
        "site-packages/a/tests/README.md": "docs",
        "site-packages/a-1.dist-info/top_level.txt": None,
        "stdlib/json/decoder.py": "code",
        "stdlib/json/decoder.so": None,
    }.items(),
)
def test_classify(path, part):
    assert classify(path) == part


def test_readme_is_what_follows_the_headers():
    assert description("Name: a\nVersion: 1\n\n# Title\n\nText\n") == "# Title\n\nText\n"
    assert description("Name: a\r\n\r\nText") == "Text"
    assert description("Name: a\n") == ""


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A small installation under a given prefix."""

    def make(prefix):
        lib = tmp_path / prefix / "lib"
        packages = lib / "site-packages"
        files = {
            lib / "json" / "decoder.py": "standard",
            lib / "json" / "__pycache__" / "decoder.py": "cached",
            lib / "LICENSE.txt": "licence",
            packages / "own-1.dist-info" / "METADATA": "Name: own\n\nThe project's own README",
            packages / "own-1.dist-info" / "direct_url.json": json.dumps({"url": "file:///x", "dir_info": {}}),
            packages / "own-1.dist-info" / "RECORD": "own.py,,\nown-1.dist-info/METADATA,,\n",
            packages / "own.py": "own",
            packages / "empty.py": "",
        }
        for i in range(30):
            files[packages / f"p{i}" / "vendored" / "six.py"] = "six " * 100
            files[packages / f"p{i}" / f"m{i}.py"] = f"module {i} " * 100
            files[packages / f"p{i}-1.dist-info" / "METADATA"] = f"Name: p{i}\n\nREADME {i}"
            files[packages / f"p{i}-1.dist-info" / "LICENSE"] = "Apache " * 100
            files[packages / f"p{i}" / "guide.md"] = f"guide {i} " * 100
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        (packages / "loop").symlink_to(packages)
        paths = {"stdlib": str(lib), "purelib": str(packages), "platlib": str(packages)}
        monkeypatch.setattr(sysconfig, "get_path", paths.__getitem__)
        roots.cache_clear()

    yield make
    monkeypatch.undo()
    roots.cache_clear()


def test_every_file_once_and_none_of_the_projects_own(installation):
    installation("a")
    found = list_files(None)
    names = [identifier(path) for _, path in found]
    assert len(names) == len(set(names)) == 2 + 30 * 5
    assert not [name for name in names if "own" in name or "cache" in name or "loop" in name or "empty" in name]
    assert ("code", "stdlib/json/decoder.py") in [(part, identifier(path)) for part, path in found]
    assert list_files(None, lambda path: "guide" in path) == [f for f in found if f[0] == "docs"]


def test_order_does_not_depend_on_the_prefix(installation):
    orders = []
    for prefix in ("a", "elsewhere/deeper"):
        installation(prefix)
        orders.append([(part, identifier(path)) for part, path in list_files(15_000)])
    assert orders[0] == orders[1]
    names = [name for _, name in orders[0]]
    assert names != sorted(names)


def test_byte_limit_leaves_room_for_every_part(installation):
    installation("a")
    limit = 15_000
    found = list_inputs(CorpusConfig.model_validate({"sources": [source(limit).model_dump()]}))
    used = {label: sum(f.bytes for f in found if f.source == label) for label in source(limit).labels}
    assert sum(used.values()) <= limit and all(used.values())
    assert used["py-readme"] <= limit / 8 and used["py-licence"] <= limit / 8 and used["py-docs"] <= limit / 4
    assert used["py-code"] > limit / 2 - 1100


def test_copies_of_a_file_stand_together(installation):
    installation("a")
    code = [path.split("/")[-1] for part, path in list_files(None) if part == "code"]
    first = code.index("six.py")
    assert code[first : first + 30] == ["six.py"] * 30


def source(max_bytes):
    return SourceConfig(name="py", kind="python-installation", max_bytes=max_bytes)


def test_this_very_installation():
    """Real files: readable, with ids that show nothing of this machine."""
    found = list_files(2_000_000)
    assert found == list_files(2_000_000)
    records = [(part, record) for part, path in found for record in read_records(path, source(None))]
    assert len(records) == len(found)
    good = [(part, r) for part, r in records if isinstance(r, Record)]
    assert {part for part, _ in good} == set(python_installation.PARTS)
    assert all(r.id and r.id.startswith(("stdlib/", "site-packages/")) for _, r in good)
    assert not [r for part, r in good if part == "readme" and r.text.startswith(b"Metadata-Version")]
    assert {r.reason for _, r in records if isinstance(r, Bad)} <= {"empty text", "invalid UTF-8", "binary file"}
