"""What the mix job tells a person about plans: tables, the arithmetic of one cell, what another plan would change."""

from collections.abc import Iterator
from typing import Any

from dataprep import storage
from dataprep.storage import UserError, join
from jobs.progress import table
from mixer.config import CLASSES, TIERS
from mixer.plan import CellPlan, Plan, StagePlan

SHOWN = 12  # rows of sources and of binding caps
MOVED = 5e-4  # a share that moves by less is not told


def show(plan: Plan) -> None:
    """Four tables: stages by class, sources by stage, tiers over all stages, and what binds."""
    stages = [
        [s.name, f"{s.context:,}", f"{s.tokens:,}", *(f"{share(s.classes[c], s.tokens):.1%}" for c in CLASSES)]
        for s in (plan.held_out, *plan.stages)
    ]
    table("plan: tokens by stage and length class", ["stage", "context", "tokens", *CLASSES], stages)

    drawn = {s.name: sums(s, "source") for s in plan.stages}
    largest = sorted(plan.sources, key=lambda name: (-sum(d.get(name, 0) for d in drawn.values()), name))
    rows = [[name, *(planned_share(s, drawn[s.name].get(name, 0), name) for s in plan.stages)] for name in largest]
    if len(rows) > SHOWN:
        rows[SHOWN:] = [[f"and {len(rows) - SHOWN} more", *[""] * len(plan.stages)]]
    table("sources: share planned (asked)", ["source", *(s.name for s in plan.stages)], rows)

    cells = totals(plan)
    by_tier = []
    for tier in TIERS:
        mine = {name: row for name, row in cells.items() if name[1] == tier}
        available, planned = sum(c.available for c, _ in mine.values()), sum(n for _, n in mine.values())
        limits = [limit for limit in plan.limits if limit.tier == tier]
        spec = plan.tiers[tier]
        bought = sum(limit.price * limit.tokens / spec["cap"] for limit in limits)
        by_tier.append(
            [
                tier,
                f"{available:,}",
                f"{spec['copies']:g}",
                f"{planned / max(1, available):.2f}",
                f"{spec['cap']}",
                f"{len(limits)} of {len(mine)}",
                f"{bought:.3g}" if bought else "",
            ]
        )
    columns = ["tier", "tokens", "copies\nasked", "\nplanned", "cap", "cells\nat it", "a cap of 1 more\nbuys, nats"]
    table("tiers, over all stages", columns, by_tier)

    bound = [
        [
            f"{x.source}/{x.tier}/{x.length_class}",
            f"{x.tokens:,}",
            f"{x.price * x.tokens / plan.tiers[x.tier]['cap']:.3g}",
        ]
        for x in plan.limits[:SHOWN]
    ]
    if bound:
        title = f"caps that bind: {len(plan.limits)} cells"
        table(title, ["cell", "tokens x cap", "a copy more\nbuys, nats"], bound)
    prices = [
        [s.name, *(f"{s.class_prices[c] * s.tokens / 100:+.3g}" if c in s.class_prices else "" for c in CLASSES)]
        for s in plan.stages
        if s.class_prices
    ]
    if prices:
        table("class shares: one point more costs, nats (differences count)", ["stage", *CLASSES], prices)


def share(part: int, whole: int) -> float:
    return part / max(1, whole)


def planned_share(stage: StagePlan, tokens: int, source: str) -> str:
    asked = f" ({stage.asked[source]:.1%})" if source in stage.asked else ""
    return f"{share(tokens, stage.tokens):.1%}{asked}"


def sums(stage: StagePlan, key: str) -> dict[str, int]:
    """Planned tokens by a column of the cells."""
    found: dict[str, int] = {}
    for cell in stage.cells:
        found[getattr(cell, key)] = found.get(getattr(cell, key), 0) + cell.planned
    return found


def totals(plan: Plan) -> dict[tuple[str, str, str], tuple[CellPlan, int]]:
    """Each cell as the last stage has it, and its tokens planned over all stages."""
    found: dict[tuple[str, str, str], tuple[CellPlan, int]] = {}
    for stage in plan.stages:
        for cell in stage.cells:
            name = (cell.source, cell.tier, cell.length_class)
            found[name] = (cell, found.get(name, (cell, 0))[1] + cell.planned)
    return found


def explain(plan: Plan, name: str) -> Iterator[str]:
    """The arithmetic of the cell SOURCE/TIER/CLASS, stage by stage."""
    key = tuple(name.rsplit("/", 2))
    cells = totals(plan)
    if key not in cells:
        some = ", ".join("/".join(known) for known in list(cells)[:SHOWN])
        raise UserError(f"--explain {name}: the plan has no such cell; a cell is SOURCE/TIER/CLASS: {some}, ...")
    last, planned = cells[key]
    spec = plan.tiers[last.tier]
    yield (
        f"cell {name}: {last.available:,} tokens without duplicates, takedowns and held-out documents; "
        f"tier {last.tier} asks for {spec['copies']:g} copies, cap {spec['cap']}"
    )
    for stage in plan.stages:
        cell = next(c for c in stage.cells if (c.source, c.tier, c.length_class) == key)
        asked = f"asked {stage.asked[key[0]]:.2%}" if stage.asked else "as they come"
        of_source = sums(stage, "source")[cell.source]
        of_class = stage.classes[cell.length_class]
        yield f"stage {stage.name}: {stage.tokens:,} tokens, context {stage.context:,}"
        yield f"  source {cell.source}: {share(of_source, stage.tokens):.2%} planned, {asked}"
        yield f"  class {cell.length_class}: {of_class:,} tokens, {share(of_class, stage.tokens):.2%} of the stage"
        yield (
            f"  usable under long_documents: {stage.long_documents}: {cell.usable:,}; planned {cell.planned:,} "
            f"({cell.why}) = {share(cell.planned, cell.usable):.4f} copies of each document"
        )
        yield f"  copies so far: {cell.copies_before:.4f} before the stage, {cell.copies_after:.4f} after it"
    whole, part = divmod(last.copies_after, 1)
    yield (
        f"in total {planned:,} tokens, {last.copies_after:.4f} copies: the documents with the highest hashes, "
        f"{part:.2%} of the tokens, are drawn {whole + 1:g} times, the others {whole:g} times"
    )
    for limit in plan.limits:
        if (limit.source, limit.tier, limit.length_class) == key:
            buys = limit.price * limit.tokens / spec["cap"]
            yield f"the cap binds: one copy more here would bring the plan {buys:.3g} nats nearer to what is asked"


def diff(old: dict[str, Any], plan: Plan, under_way: dict[str, str]) -> Iterator[str]:
    """What changes from an older plan (its JSON), and what it means for stages that are packed or trained already."""
    try:
        before = Plan.from_json(old, None)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"--diff: this is not a plan of this version ({type(error).__name__}: {error})") from None
    was = {s.name: s for s in before.stages}
    changed = [s.name for s in plan.stages if s.name not in was or draws(was[s.name]) != draws(s)]
    for name in (s.name for s in before.stages if s.name not in {s.name for s in plan.stages}):
        yield f"stage {name}: is gone"
        changed.append(name)
    for stage in plan.stages:
        if stage.name not in changed:
            yield f"stage {stage.name}: the same"
        elif stage.name not in was:
            yield f"stage {stage.name}: is new, {stage.tokens:,} tokens"
        else:
            yield f"stage {stage.name}: {'; '.join(changes(was[stage.name], stage))}"
    if before.seed != plan.seed or old["places"] != plan.to_json()["places"]:
        yield "the documents or the seed are not the same: every stage draws other documents"
        changed = [*was]
    if not changed:
        yield "nothing changes for a run under way"
        return
    done = [s for s in before.stages if s.name in under_way]
    for stage in done:
        state = under_way[stage.name]
        what = "would draw other documents, or others as often" if stage.name in changed else "would be the same"
        yield f"stage {stage.name} is {state}, and {what}"
    yield "shards bear the fingerprint of their whole plan: jobs/mix.py would pack every stage again, under other names"
    yield from spent(before, plan, [s.name for s in done])


def draws(stage: StagePlan) -> tuple[Any, ...]:
    """All of a stage that decides its shards, beside documents and seed."""
    cells = tuple((c.source, c.tier, c.length_class, c.copies_before, c.copies_after) for c in stage.cells)
    return (stage.context, stage.rope_base, stage.long_documents, stage.shards, stage.densities, cells)


def changes(old: StagePlan, new: StagePlan) -> Iterator[str]:
    for key in ("context", "rope_base", "tokens", "long_documents", "shards"):
        if getattr(old, key) != getattr(new, key):
            yield f"{key} {getattr(old, key)} -> {getattr(new, key)}"
    for key in ("length_class", "tier", "source"):
        parts = [{name: share(n, s.tokens) for name, n in sums(s, key).items()} for s in (old, new)]
        moved = {name: (parts[0].get(name, 0.0), parts[1].get(name, 0.0)) for name in parts[0] | parts[1]}
        largest = sorted(moved, key=lambda name: (-abs(moved[name][1] - moved[name][0]), name))[:SHOWN]
        for name in largest:
            if abs(moved[name][1] - moved[name][0]) >= MOVED:
                yield f"{name} {moved[name][0]:.1%} -> {moved[name][1]:.1%}"
    if old.densities != new.densities:
        yield "the course of its sources over the stage"
    cells = [
        {(c.source, c.tier, c.length_class): (c.copies_before, c.copies_after) for c in s.cells} for s in (old, new)
    ]
    yield f"{sum(cells[0].get(name) != cells[1].get(name) for name in cells[0] | cells[1]):,} cells other copies"


def spent(before: Plan, plan: Plan, done: list[str]) -> Iterator[str]:
    """Caps, if the stages that are done stay as they are and the rest of the new plan follows."""
    if not done:
        return
    taken = copies([s for s in before.stages if s.name in done])
    follows = copies([s for s in plan.stages if s.name not in done])
    over = []
    for name, (cell, _) in totals(plan).items():
        had, rest = taken.get(name, 0.0), follows.get(name, 0.0)
        excess = had + rest - plan.tiers[cell.tier]["cap"]
        if rest and excess > 1e-9:
            over.append((excess * cell.available, "/".join(name), had, rest))
    yield f"if {', '.join(done)} stay as they are and the other stages follow the new plan:"
    if not over:
        yield "  no cell would exceed its cap on average (a document may get one copy more where its places changed)"
    for _, cell_name, had, rest in sorted(over, reverse=True)[:SHOWN]:
        yield f"  {cell_name}: {had:.2f} copies are spent and {rest:.2f} would follow, over the cap"
    if len(over) > SHOWN:
        yield f"  and {len(over) - SHOWN} more cells over their caps"


def copies(stages: list[StagePlan]) -> dict[tuple[str, str, str], float]:
    """Copies by cell that these stages draw together."""
    found: dict[tuple[str, str, str], float] = {}
    for stage in stages:
        for c in stage.cells:
            name = (c.source, c.tier, c.length_class)
            found[name] = found.get(name, 0.0) + c.copies_after - c.copies_before
    return found


def under_way(root: str, stages: list[str]) -> dict[str, str]:
    """The stages in `latest` that are more than planned: `packed in part`, `packed` or `trained`."""
    found = {}
    run = storage.latest(root, "train")
    for name in stages:
        directory = storage.latest(root, f"pack-{name}")
        if run and storage.exists(join(run, name, "done.json")):
            found[name] = "trained"
        elif directory and storage.exists(join(directory, "end.json")):
            found[name] = "packed"
        elif directory and storage.expand(join(directory, "*.commit.json")):
            found[name] = "packed in part"
    return found
