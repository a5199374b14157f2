"""What the mix job tells a person about plans: tables, the arithmetic of one cell, what another plan would change."""

from collections.abc import Iterator
from typing import Any

from dataprep import storage
from dataprep.storage import UserError, join
from jobs.progress import say, table
from mixer.config import CLASSES, TIERS
from mixer.guarantees import CELL
from mixer.plan import Plan, StagePlan

SHOWN = 12  # rows of sources, of binding caps, of changes
MOVED = 5e-4  # a share that moves by less is not told
MISSED = 5e-3  # a source that misses what was asked by less is not told
WINDOWS = 10  # of a stage whose sources come and go: with fewer, its course is followed coarsely


def show(plan: Plan) -> None:
    """Tables: stages by class, sources by stage, tiers over all stages, what binds; then what a person must know."""
    stages = [
        [s.name, f"{s.context:,}", f"{s.tokens:,}", *(f"{share(s.classes[c], s.tokens):.1%}" for c in CLASSES)]
        for s in (plan.held_out, *plan.stages)
    ]
    table("plan: tokens by stage and length class", ["stage", "context", "tokens", *CLASSES], stages)

    drawn = [s.by("source") for s in plan.stages]
    largest = sorted(plan.sources, key=lambda name: (-sum(d[name] for d in drawn if name in d), name))
    rows = []
    for name in largest[:SHOWN]:
        asked = [f" ({s.asked[name]:.1%})" if s.asked else "" for s in plan.stages]
        is_ = [f"{share(d.get(name, 0), s.tokens):.1%}" for d, s in zip(drawn, plan.stages, strict=True)]
        rows.append([name, *(a + b for a, b in zip(is_, asked, strict=True))])
    rows += more(len(largest))
    table("sources: share planned (asked)", ["source", *(s.name for s in plan.stages)], rows)

    rows = []
    for tier, spec in ((tier, plan.tiers[tier]) for tier in TIERS):
        cells = [c for c in plan.stages[-1].cells if c.tier == tier]
        available, planned = sum(c.available for c in cells), sum(s.by("tier").get(tier, 0) for s in plan.stages)
        prices = [plan.copy_price(limit) for limit in plan.limits if limit.tier == tier]
        copies = [f"{spec['copies']:g}", f"{share(planned, available):.2f}", f"{spec['cap']}"]
        bought = f"{sum(prices):.3g}" if sum(prices) else ""
        rows.append([tier, f"{available:,}", *copies, f"{len(prices)} of {len(cells)}", bought])
    columns = ["tier", "tokens", "copies\nasked", "\nplanned", "cap", "cells\nat it", "a cap of 1 more\nbuys, nats"]
    table("tiers, over all stages", columns, rows)

    bound = [[x.name, f"{x.tokens:,}", f"{plan.copy_price(x):.3g}"] for x in plan.limits[:SHOWN]]
    table(f"caps that bind: {len(plan.limits)} cells", ["cell", "tokens x cap", "a copy more\nbuys, nats"], bound)
    rows = [
        [s.name, *(f"{s.class_prices[c] * s.tokens / 100:+.3g}" if c in s.class_prices else "" for c in CLASSES)]
        for s in plan.stages
        if s.class_prices
    ]
    table("class shares: one point more costs, nats (differences count)", ["stage", *CLASSES], rows)
    for line in (*missed(plan), *coarse(plan)):
        say(line)


def show_packed(stages: list[str], ends: list[dict[str, Any]]) -> None:
    """What packing promises (mixer/guarantees.py), as it turned out; shares stand beside the planned ones."""
    numbers, shares = [], []
    for name, end in zip(stages, ends, strict=True):
        t = end["totals"]
        counts = [f"{n:,}" for n in (end["sequences"], t["items"], t["truncated"], t["dropped"], t["cut"], t["pieces"])]
        squares = " / ".join(f"{n:.2g}" for n in t["sum_of_squares"].values())
        rest = [f"{t['padding_share']:.3%}", f"{t['segments_per_sequence']:.1f}", squares]
        numbers.append([name, *counts, *rest, f"{t['order_length_correlation']:+.2f}"])
        parts = [t["shares"][by].items() for by in CELL]
        texts = [", ".join(f"{k} {100 * is_:.1f} ({100 * plan:.1f})" for k, (plan, is_) in part) for part in parts]
        shares.append([name, *texts])
    columns = ["stage", "sequences", "documents", "truncated", "dropped", "cut", "pieces", "padding", "per sequence"]
    columns += ["sum of squares p50 / p99 / max", "order x length"]
    table("packed: none lost, none cut that fits, none over its cap", columns, numbers)
    table("achieved shares (planned), %", ["stage", *(by.replace("_", " ") for by in CELL)], shares)


def more(number: int) -> list[list[str]]:
    return [[f"and {number - SHOWN} more"]] if number > SHOWN else []


def share(part: int, whole: int) -> float:
    return part / max(1, whole)


def missed(plan: Plan) -> Iterator[str]:
    """Sources that a stage gives another share than asked, and what stands in the way: there is no nearer plan."""
    for s in plan.stages:
        is_ = {name: share(tokens, s.tokens) for name, tokens in s.by("source").items()}
        off = {name: is_.get(name, 0.0) - asked for name, asked in s.asked.items()}
        capped = {c.source for c in s.cells if c.why == "cap binds" and off.get(c.source, 0.0) < 0}
        for name in sorted((n for n in off if abs(off[n]) >= MISSED), key=lambda n: (-abs(off[n]), n))[:SHOWN]:
            mine = sorted(
                (c for c in s.cells if c.source == name and c.why == "cap binds"), key=lambda c: (-c.planned, c.name)
            )
            if off[name] < 0 and mine:
                caps = ", ".join(f"{c.name} ({plan.tiers[c.tier]['cap']} copies)" for c in mine[:3])
                why = f"caps bind: {caps}{f' and {len(mine) - 3} more' if len(mine) > 3 else ''}"
            elif capped:
                why = f"it stands in for sources whose caps bind: {', '.join(sorted(capped)[:3])}"
            else:
                why = "the class shares, or other stages, leave no nearer plan"
            yield f"stage {s.name}: source {name} has {is_.get(name, 0.0):.1%} of the {s.asked[name]:.1%} asked; {why}"


def coarse(plan: Plan) -> Iterator[str]:
    for s in plan.stages:
        if s.densities and s.shards < WINDOWS:
            most = s.tokens // WINDOWS
            way = f"set mix.shard_tokens to {most:,} or less" if most >= s.context else f"give it {WINDOWS} sequences"
            yield (
                f"warning: stage {s.name} has {s.shards} windows, too few to follow its transition or blend: sources "
                f"change from window to window only; {way} (mix.shard_tokens is {plan.config['shard_tokens']:,})"
            )


def explain(plan: Plan, name: str) -> Iterator[str]:
    """The arithmetic of the cell SOURCE/TIER/CLASS, stage by stage."""
    found = [(s, c) for s in plan.stages for c in s.cells if c.name == name]
    if not found:
        some = ", ".join(c.name for c in plan.stages[0].cells[:SHOWN])
        raise UserError(f"--explain {name}: the plan has no such cell; a cell is SOURCE/TIER/CLASS: {some}, ...")
    last = found[-1][1]
    spec = plan.tiers[last.tier]
    yield (
        f"cell {name}: {last.available:,} tokens without duplicates, takedowns and held-out documents; "
        f"tier {last.tier} asks for {spec['copies']:g} copies, cap {spec['cap']}"
    )
    for stage, cell in found:
        asked = f"asked {stage.asked[cell.source]:.2%}" if stage.asked else "as they come"
        of_class = stage.classes[cell.length_class]
        yield f"stage {stage.name}: {stage.tokens:,} tokens, context {stage.context:,}"
        yield f"  source {cell.source}: {share(stage.by('source')[cell.source], stage.tokens):.2%} planned, {asked}"
        yield f"  class {cell.length_class}: {of_class:,} tokens, {share(of_class, stage.tokens):.2%} of the stage"
        yield (
            f"  usable under long_documents: {stage.long_documents}: {cell.usable:,}; planned {cell.planned:,} "
            f"({cell.why}) = {share(cell.planned, cell.usable):.4f} copies of each document"
        )
        yield f"  copies so far: {cell.copies_before:.4f} before the stage, {cell.copies_after:.4f} after it"
    whole, part = divmod(last.copies_after, 1)
    yield (
        f"in total {sum(c.planned for _, c in found):,} tokens, {last.copies_after:.4f} copies: the documents with the "
        f"highest hashes, {part:.2%} of the tokens, are drawn {whole + 1:g} times, the others {whole:g} times"
    )
    for limit in (x for x in plan.limits if x.name == name):
        buys = plan.copy_price(limit)
        yield f"the cap binds: one copy more here would bring the plan {buys:.3g} nats nearer to what is asked"


def diff(old: dict[str, Any], plan: Plan, under_way: dict[str, str]) -> Iterator[str]:
    """What changes from an older plan (its JSON) and why, and what it means for stages packed or trained already."""
    try:
        before = Plan.from_json(old, None)
        was = {s.name: (s, draws(before, s, old["places"])) for s in before.stages}
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        raise UserError("--diff: this is not a plan of this version; plan again to compare with") from None
    places = plan.to_json()["places"]
    why = [*settings("mix", before.config, plan.config)]
    why += documents(before, plan, old["places"]["documents"] != places["documents"])
    yield from why[:SHOWN]
    yield from (line for (line,) in more(len(why)))
    changed = {name for name in was if name not in {s.name for s in plan.stages}}
    yield from (f"stage {name}: is gone" for name in sorted(changed))
    for stage in plan.stages:
        if stage.name not in was:
            yield f"stage {stage.name}: is new, {stage.tokens:,} tokens"
        elif was[stage.name][1] == draws(plan, stage, places):
            yield f"stage {stage.name}: the same"
            continue
        else:
            yield f"stage {stage.name}: {'; '.join(moves(was[stage.name][0], stage))}"
        changed.add(stage.name)
    if not changed:
        yield "nothing changes for a run under way"
        return
    if not why:
        yield "why is unknown: settings and documents are the same; the plan may be another version's"
    done = [name for name in was if name in under_way]
    for name in done:
        what = "would draw other documents, or others as often" if name in changed else "would be the same"
        yield f"stage {name} is {under_way[name]}, and {what}"
    yield "shards bear the fingerprint of their whole plan: jobs/mix.py would pack every stage again, under other names"
    if done:
        yield from spent(before, plan, done)


def draws(plan: Plan, stage: StagePlan, places: dict[str, Any]) -> tuple[Any, ...]:
    """All that decides a stage's shards."""
    cuts = places["cuts"][stage.index : stage.index + 2]
    about = (stage.context, stage.rope_base, stage.long_documents, stage.shards, stage.densities)
    return plan.seed, places["documents"], cuts, about


def settings(key: str, old: Any, new: Any) -> Iterator[str]:
    """Keys whose values differ, one by one; in lists, by their places."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            yield from settings(f"{key}.{name}", old.get(name), new.get(name))
    elif old != new:
        was, is_ = ("none" if v is None else "given" if isinstance(v, dict) else v for v in (old, new))
        yield f"{key}: {was} -> {is_}"


def documents(before: Plan, plan: Plan, moved: bool) -> Iterator[str]:
    """Cells with other tokens. moved: whether places differ, as they do with the documents and with their hashes."""
    was, is_ = (
        {
            f"{'held-out ' if s is p.held_out else ''}{c.name}": c.available
            for s in (p.stages[0], p.held_out)
            for c in s.cells
        }
        for p in (before, plan)
    )
    cells = [name for name in was | is_ if was.get(name, 0) != is_.get(name, 0)]
    yield from (f"documents of {name}: {was.get(name, 0):,} -> {is_.get(name, 0):,} tokens" for name in cells)
    if moved and not cells:
        yield "documents: others, of as many tokens, or in other places by their hashes"


def moves(old: StagePlan, new: StagePlan) -> Iterator[str]:
    for column in ("length_class", "tier", "source"):
        was, is_ = ({name: share(n, s.tokens) for name, n in s.by(column).items()} for s in (old, new))
        by = {name: is_.get(name, 0.0) - was.get(name, 0.0) for name in was | is_}
        for name in sorted((n for n in by if abs(by[n]) >= MOVED), key=lambda n: (-abs(by[n]), n))[:SHOWN]:
            yield f"{name} {was.get(name, 0.0):.1%} -> {is_.get(name, 0.0):.1%}"
    if old.densities != new.densities:
        yield "the course of its sources over the stage"
    cells = [{c.name: (c.copies_before, c.copies_after) for c in s.cells} for s in (old, new)]
    yield f"{sum(cells[0].get(name) != cells[1].get(name) for name in cells[0] | cells[1]):,} cells other copies"


def spent(before: Plan, plan: Plan, done: list[str]) -> Iterator[str]:
    """Caps, if the stages that are done stay as they are and the rest of the new plan follows."""

    def copies(stages: list[StagePlan]) -> dict[str, float]:
        found: dict[str, float] = {}
        for c in (c for s in stages for c in s.cells):
            found[c.name] = found.get(c.name, 0.0) + c.copies_after - c.copies_before
        return found

    taken = copies([s for s in before.stages if s.name in done])
    follows = copies([s for s in plan.stages if s.name not in done])
    over = []
    for c in plan.stages[0].cells:
        had, rest = taken.get(c.name, 0.0), follows.get(c.name, 0.0)
        excess = had + rest - plan.tiers[c.tier]["cap"]
        if rest and excess > 1e-9:
            line = f"  {c.name}: {had:.2f} copies are spent and {rest:.2f} would follow, over the cap"
            over.append((-excess * c.available, line))
    yield f"if {', '.join(done)} stay as they are and the other stages follow the new plan:"
    if not over:
        yield "  no cell would exceed its cap on average (a document may get one copy more where its places changed)"
    yield from (line for _, line in sorted(over)[:SHOWN])
    yield from (f"  {line}" for (line,) in more(len(over)))


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
