"""What the documents show can be used: every YAML block and every file in `configs/` loads as a configuration."""

import re
from pathlib import Path

import pytest
import yaml

from jobs.config import load

CHECKOUT = Path(__file__).resolve().parents[1]
BLOCKS = [
    pytest.param(found[1], id=f"{page.name}:{page.read_text()[: found.start()].count(chr(10)) + 1}")
    for page in (CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md")))
    for found in re.finditer(r"^```yaml\n(.*?)^```", page.read_text(), re.M | re.S)
]


@pytest.mark.parametrize("path", sorted((CHECKOUT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_configuration_loads(path):
    load(str(path))


@pytest.mark.parametrize("block", BLOCKS)
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


def test_the_blocks_are_found():
    assert len(BLOCKS) > 5
