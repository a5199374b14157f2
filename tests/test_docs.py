"""What the documents show can be used: YAML loads, keys, flags, links and files exist, commands say who ran them."""

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import pytest
import yaml

from jobs.config import Config, load

CHECKOUT = Path(__file__).resolve().parents[1]
PAGES = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
PROGRAMS = ("python", "make", "torchrun", "ray", ".")
RUN_BY = re.compile(r"> (Run by `(tests/\S+\.py|\.ci/run)`|Run for the release\b).*")


class Command(NamedTuple):
    """One line of a page that a reader may type; by: the test that runs it, None if it was run for the release."""

    page: str
    line: str
    said: bool
    by: str | None

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def commands() -> list[Command]:
    """Every indented line that begins with a program; a line `> Run ...` speaks for those below it, up to the next."""
    found = []
    for page in [CHECKOUT / "docs/tutorial.md", *PAGES]:  # the tutorial's first: others use what it makes
        said = None
        for line in page.read_text().splitlines():
            said = RUN_BY.fullmatch(line) or said
            if line.startswith("    ") and line.split()[0] in PROGRAMS and "[--" not in line:
                found.append(Command(page.name, line.strip(), said is not None, said[2] if said else None))
    return list(dict.fromkeys(found))


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    page = next(page for page in PAGES if page.name == name)
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


YAML = [pytest.param(b, id=f"{p.name}-{n}") for p in PAGES for n, b in enumerate(blocks(p.name, "yaml"))]


@pytest.mark.parametrize("path", sorted((CHECKOUT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_loads(path):
    load(str(path))


@pytest.mark.parametrize("block", YAML)
def test_every_yaml_block_loads(block, tmp_path):
    """A part of a configuration gets what it leaves out: a root, the sources and the stages that it names."""
    given = yaml.safe_load(block)
    given.setdefault("root", "runs/x")
    quality, tokens = given.get("quality", {}), given.get("tokens", {})
    sources = {"web", *quality.get("by_source", {}), *tokens.get("source_weights", {})}
    sources |= {tier["source"] for tier in quality.get("tiers", []) if "source" in tier}
    given.setdefault("corpus", {"sources": [{"name": name, "paths": ["/in"]} for name in sorted(sources)]})
    mix, stages = given.setdefault("mix", {}), ["main", *given.get("train", {}).get("stages", {})]
    if not {"stages", "preset"} & mix.keys():
        mix["stages"] = [{"name": name, "context": 1 << 20, "tokens": 1} for name in sorted(set(stages))]
        mix.setdefault("shard_tokens", 1 << 26)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    load(str(path))


def test_every_command_says_who_ran_it():
    found = commands()
    assert len(found) > 50
    assert not [str(c) for c in found if not c.said], "commands below no line `> Run by ...` or `> Run for the release`"
    assert not [str(c) for c in found if c.by and not (CHECKOUT / c.by).exists()]


def test_every_benchmark_has_the_flags_that_are_shown():
    shown = [c.words for c in commands() if c.words[:2] == ["python", "-m"] and c.words[2].startswith("benchmarks.")]
    common = (CHECKOUT / "benchmarks/common.py").read_text()
    for words in shown:
        code = (CHECKOUT / words[2].replace(".", "/")).with_suffix(".py").read_text()
        assert not [w for w in words if w.startswith("--") and f'"{w}"' not in code + common], words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_of_a_job_exists(page):
    """Also in running text; `--section.key` is the next test's."""
    shared = (CHECKOUT / "jobs/cli.py").read_text() + '"--root" "--workers"'
    for name, words in re.findall(r"\b(jobs/\w+\.py)([^`\n]*)", page.read_text()):
        code = (CHECKOUT / name).read_text() if (CHECKOUT / name).exists() else ""  # jobs/NAME.py stands for any
        assert not [flag for flag in re.findall(r"(--[a-z-]+)\b(?!\.)", words) if f'"{flag}"' not in code + shared]


def members(kind: Any, name: str) -> list[Any]:
    """The types that a key of this type may have: a model's field, a mapping's values, or either inside a list."""
    if hasattr(kind, "model_fields"):
        return [kind.model_fields[name].annotation] if name in kind.model_fields else []
    inner = get_args(kind)
    return [inner[1]] if get_origin(kind) is dict else [m for k in inner for m in members(k, name)]


def has(key: str) -> bool:
    kinds: list[Any] = [Config]
    for name in key.replace("[]", "").split("."):
        kinds = [m for kind in kinds for m in members(kind, name)]
    return bool(kinds)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_is_named_exists(page):
    sections = "|".join(Config.model_fields)
    found = re.findall(rf"(?:--|`)((?:{sections})(?:\.[a-z_\[\]]+)+)(?!\.?\w)(?<!\.py)", page.read_text())
    for section, rows in re.findall(r"^\| keys? of `([\w.\[\]]+)` .*\n\|[-| ]+\n((?:\|.*\n)+)", page.read_text(), re.M):
        found += [f"{section}.{k}" for row in rows.splitlines() for k in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert not [key for key in found if not has(key)]


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        assert to.exists(), target
        assert not anchor or anchor in map(slug, re.findall(r"^#+ (.*)", to.read_text(), re.M)), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    folders = "benchmarks|configs|dataprep|dedup|docs|jobs|kernels|mixer|tests|trainer"
    for name in re.findall(rf"(?<![\w/])((?:{folders})/[\w./-]+\.(?:py|md|yaml|svg|txt))", page.read_text()):
        assert (CHECKOUT / name).exists() or name in ("jobs/NAME.py", "jobs/X.py"), name


def test_what_these_tests_look_for_is_found():
    text = "".join(page.read_text() for page in PAGES)
    assert len(YAML) > 5 and "--dedup.threshold" in text and has("mix.stages[].context") and not has("dedup.treshold")
    assert has("train.stages.any") and not has("corpus.sources[].pathz")
