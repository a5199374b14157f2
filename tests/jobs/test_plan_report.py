"""What the mix job tells of plans: tables, a cell's arithmetic, differences and what they mean for a run under way."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pytest

from dataprep.storage import UserError, write_json
from jobs import mix, plan_report
from jobs.cli import main
from jobs.config import load
from jobs.progress import console
from mixer.planner import make_plan
from tests.jobs import small
from tests.mixer.corpus import config
from tests.mixer.recipes import inventory

CELLS = [("books/old", "high", "short", 1000), ("web", "low", "short", 9000), ("web", "medium", "long", 4000)]
STAGES = ({"tokens": 20_000}, {"tokens": 3000, "shares": {"short": 0.4, "long": 0.6}, "source_weights": {"web": 0.5}})


def plan_of(*stages, cells=CELLS, **rest):
    return make_plan(inventory(cells, len(stages)), config(*stages, **rest))


def lines(old, new, **under_way) -> str:
    return "\n".join(plan_report.diff(json.loads(json.dumps(old.to_json())), new, under_way))


def test_the_tables_tell_shares_caps_and_prices():
    plan = plan_of(*STAGES)
    with console.capture() as capture:
        plan_report.show_plan(plan)
    shown = capture.get()
    assert "60.00%" in shown and "50.00%" in shown
    assert plan.limits and "Caps that bind" in shown and "books/old/high/short" in shown


def test_a_cell_is_explained_through_all_stages():
    plan = plan_of(*STAGES)
    told = "\n".join(plan_report.explain(plan, "books/old/high/short"))
    assert "1,000 tokens without duplicates" in told and "asks for 4 copies, cap 4" in told
    for stage in plan.stages:
        cell = next(c for c in stage.cells if c.source == "books/old")
        assert f"planned {cell.planned:,} ({cell.why})" in told and f"{cell.copies_after:.4f} after it" in told
    assert "the cap binds: one copy more" in told
    with pytest.raises(UserError, match=r"no such cell; a cell is SOURCE/TIER/CLASS: books/old/high/short"):
        list(plan_report.explain(plan, "books/low/short"))


def test_the_same_plan_changes_nothing():
    plan = plan_of(*STAGES)
    assert lines(plan, plan_of(*STAGES), s0="packed") == (
        "stage s0: the same\nstage s1: the same\nnothing changes for a run under way"
    )


def test_differences_and_what_they_mean_for_a_run_under_way():
    old = plan_of({"tokens": 3000}, {"tokens": 2000, "shares": {"short": 1.0}})
    new = plan_of({"tokens": 3000}, {"tokens": 20_000, "shares": {"short": 1.0}, "context": 512})
    told = lines(old, new, s0="trained")
    assert "mix.stages.1.context: 256 -> 512\nmix.stages.1.tokens: 2000 -> 20000\nstage s0: " in told
    assert "stage s0 is trained, and would draw other documents, or others as often" in told
    assert "jobs/mix.py would pack every stage again" in told
    told = lines(plan_of(STAGES[0]), plan_of(*STAGES), s0="packed")
    assert "mix.stages.1: none -> given" in told and "stage s1: is new, 3,000 tokens" in told
    assert "stage s1: is gone" in lines(plan_of(*STAGES), plan_of(STAGES[0]))


def test_what_has_changed_is_named_and_nothing_else():
    old = plan_of(*STAGES)
    more = lines(old, plan_of(*STAGES, cells=[*CELLS, ("new", "low", "long", 5), ("web", "low", "short", 7)]))
    assert more.startswith(
        "documents of web/low/short: 9,000 -> 9,007 tokens\ndocuments of new/low/long: 0 -> 5 tokens\nstage s0: "
    )
    assert "mix." not in more.split("\nshards bear")[0] and "unknown" not in more
    other = plan_of(*STAGES)
    values = other.places.to_pydict()
    values["knots"] = [[knot + 1 for knot in knots] for knots in values["knots"]]
    other = dataclasses.replace(other, places=pa.table(values, schema=other.places.schema))
    assert lines(old, other).startswith(
        "documents: others, of as many tokens, or in other places by their hashes\nstage s0: 0 cells other copies\n"
    )
    seed = lines(old, plan_of(*STAGES, seed=1))
    assert seed.startswith("mix.seed: 0 -> 1\nstage s0: 0 cells other copies\n")
    tiers = lines(old, plan_of(*STAGES, tiers={"low": {"cap": 3}}))
    assert tiers.startswith("mix.tiers.low.cap: 2 -> 3\nstage s0:") and "documents of" not in tiers


def test_sources_stand_beside_what_was_asked_with_the_caps_in_their_way():
    """The largest misses first, so that none is hidden below the end of a terminal's table."""
    cells = [("books", "low", "short", 1000), ("qa", "low", "short", 9000), ("web", "low", "short", 9000)]
    plan = plan_of({"tokens": 10_000, "source_weights": {"books": 0.5, "qa": 0.3, "web": 0.2}}, cells=cells)
    totals = {"s0": {"shares": {"length_class": {"short": [1.0, 0.99]}, "source": {"books": [0.2, 0.21]}}}}
    classes, sources = plan_report.shares(plan, totals)
    assert sources.rows == [
        ["s0", "books", 0.5, 0.2, 0.21, 2000, "books/low/short"],
        ["s0", "qa", 0.3, pytest.approx(0.48), None, 4800, ""],
        ["s0", "web", 0.2, pytest.approx(0.32), None, 3200, ""],
    ]
    assert ["s0", 256, "short", None, 1.0, 0.99, 10_000] in classes.rows


def test_a_stage_with_too_few_windows_for_its_course_is_told():
    stages = ({"tokens": 3000}, {"tokens": 3000, "source_weights": {"web": 1.0}, "transition": 0.5})
    for tokens, warned in ((500, True), (300, False)):
        with console.capture() as capture:
            plan_report.show_plan(plan_of(*stages, shard_tokens=tokens))
        assert ("stage s1 has 6 windows, too few to follow" in capture.get()) == warned


def test_what_is_no_plan_is_refused():
    for value in ({"stages": 3}, [], {"stages": [{}], "places": ""}):
        with pytest.raises(UserError, match="not a plan of this version"):
            list(plan_report.diff(value, plan_of(*STAGES), {}))


def run(path: str, *flags: str) -> str:
    with console.capture() as capture:
        assert main(mix, [path, *flags]) == 0
    return capture.get()


def test_the_job_plans_explains_and_compares_without_packing(tmp_path, capfd):
    small.write_corpus(tmp_path / "in")
    path = small.write_config(tmp_path)
    stages = small.config(tmp_path)["mix"]["stages"]
    other = small.write_config(tmp_path, "other.yaml", mix={"stages": [stages[0], stages[1] | {"tokens": 5000}]})
    assert "Shares of length classes" in run(path, "--plan-only")
    root = Path(load(path).root)
    before = {str(f) for f in root.rglob("*")}
    assert not list(root.glob("pack-*")) and not list((root / "latest").glob("pack-*"))
    assert "in total" in run(path, "--explain", "tales/medium/short")
    assert "nothing changes" in run(path, "--diff")
    assert "mix.stages.1.tokens: 10000 -> 5000" in run(other, "--diff")
    assert {str(f) for f in root.rglob("*")} == before
    for text in ("", "[]", '{"stages": [1]}'):
        (tmp_path / "odd.json").write_text(text)
        assert main(mix, [path, "--diff", str(tmp_path / "odd.json")]) == 1
        assert "odd.json is no plan" in " ".join(capfd.readouterr().err.split())
    plan = next(root.glob("plan-*/*.plan.*.json"))
    run(other, "--plan-only")
    assert "tokens: 10000 -> 5000" in run(other, "--diff", str(plan))
    write_json(str(root / "latest" / "pack-base.json"), {"directory": "pack-base-x"})
    write_json(str(root / "pack-base-x" / "end.json"), {})
    assert plan_report.under_way(str(root), ["base", "longer"]) == {"base": "packed"}


@pytest.mark.parametrize("name", ["demo", "minimax-text-01", "minimax-text-01-small"])
def test_the_configurations_that_come_with_the_project_are_valid(name):
    assert len(load(str(Path(__file__).parents[2] / "configs" / f"{name}.yaml")).mix.stages) == 4
