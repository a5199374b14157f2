"""What a person is told about plans: tables, the arithmetic of one cell, what another plan would change."""

from collections.abc import Iterator, Mapping
from typing import Any

from dataprep import storage
from dataprep.storage import UserError, join
from jobs.progress import say
from jobs.tables import Table, show
from mixer.config import CLASSES
from mixer.plan import Plan, StagePlan

SHOWN = 12  # changes, cells
MOVED = 5e-4  # a share that moves by less is not told
WINDOWS = 10  # of a stage whose sources come and go: with fewer, its course is followed coarsely
Totals = Mapping[str, dict[str, Any]]  # of the stages that are packed, by name (mixer/guarantees.py)


def show_plan(plan: Plan) -> None:
    """Shares, tiers and what binds; then what a person must know."""
    for table in (*shares(plan, {}), *limits(plan, {})):
        show(table)
    for s in plan.stages:
        if s.densities and s.shards < WINDOWS:
            say(
                f"warning: stage {s.name} has {s.shards} windows, too few to follow its transition or blend: sources "
                f"change from window to window only; give it {WINDOWS}, with a smaller mix.shard_tokens (now "
                f"{plan.config['shard_tokens']:,}) or more tokens"
            )


def show_packed(plan: Plan, totals: Totals) -> None:
    for table in (packed(plan, totals), *shares(plan, totals)):
        show(table)


def shares(plan: Plan, totals: Totals) -> list[Table]:
    """Of every stage its length classes, and its sources: share asked, planned and packed; largest misses first."""
    wishes = {s["name"]: s["shares"] or {} for s in plan.config["stages"]}
    classes, sources = [], []
    for s in (plan.held_out, *plan.stages):
        achieved = totals.get(s.name, {}).get("shares", {"length_class": {}, "source": {}})
        for c in CLASSES:
            achieved_here = achieved["length_class"].get(c, [None, None])[1]
            asked = wishes.get(s.name, {}).get(c)
            classes.append([s.name, s.context, c, asked, share(s.classes[c], s.tokens), achieved_here, s.classes[c]])
        for source, tokens in s.by("source").items() if s is not plan.held_out else ():
            achieved_here = achieved["source"].get(source, [None, None])[1]
            bound = [cell.name for cell in s.cells if cell.source == source and cell.why == "cap binds"]
            about = [s.asked.get(source), share(tokens, s.tokens), achieved_here, tokens]
            sources.append([s.name, source, *about, ", ".join(bound[:3]) + ", ..." * (len(bound) > 3)])
    sources.sort(key=lambda row: (-round(abs(row[3] - (row[3] if row[2] is None else row[2])), 3), -row[5]))
    columns = "asked:share, planned:share, packed:share, tokens:count"
    note = "Asked is empty where sources come as they are. Only a cap that binds, class shares and other stages keep a "
    note += "source from what was asked: no plan is nearer."
    return [
        Table("Shares of length classes", f"stage, context:count, class, {columns}", classes),
        Table("Shares of sources", f"stage, source, {columns}, caps that bind", sources, note),
    ]


def limits(plan: Plan, totals: Totals) -> list[Table]:
    """Tiers over all stages, the cells whose caps bind, and what class shares cost."""
    tiers = []
    for tier, spec in plan.tiers.items():
        available = sum(c.available for c in plan.stages[-1].cells if c.tier == tier)
        planned = sum(s.by("tier").get(tier, 0) for s in plan.stages)
        most = [t["most_copies"][tier][0] for t in totals.values() if tier in t["most_copies"]]
        bound = sum(limit.tier == tier for limit in plan.limits)
        copies = [spec["copies"], share(planned, available), max(most, default=None), spec["cap"]]
        tiers.append([tier, available, *copies, bound])
    caps = [[x.name, x.tokens, plan.copy_price(x)] for x in plan.limits]
    prices = [[s.name, c, s.class_prices[c] * s.tokens / 100] for s in plan.stages for c in s.class_prices]
    columns = "tier, tokens:count, copies asked:number, planned:number, most drawn:count, cap:count"
    return [
        Table("Tiers, over all stages", f"{columns}, cells at the cap:count", tiers),
        Table("Caps that bind", "cell, tokens x cap:count, a copy more buys:number", caps,
              "In nats that the plan would come nearer to what is asked."),
        Table("What class shares cost", "stage, class, one point more:number", prices,
              "In nats that the plan would move away; differences count."),
    ]  # fmt: skip


def packed(plan: Plan, totals: Totals) -> Table:
    """What packing promises, as it turned out."""
    names = ("sequences", "items", "truncated", "dropped", "cut", "padding_share", "segments_per_sequence")
    rows = []
    for s in (plan.held_out, *plan.stages):
        if t := totals.get(s.name):
            cost = t["sum_of_squares"]["p99"] / s.context**2
            rows.append([s.name, *(t[name] for name in names), cost, t["order_length_correlation"]])
    columns = "stage, sequences:count, documents:count, truncated:count, dropped:count, cut:count, padding:share"
    columns += ", documents per sequence:number, attention p99 of context²:share, order x length:number"
    return Table("Packed", columns, rows, "Every token is counted, no document that fits is cut, no cap is passed.")


def share(part: int, whole: int) -> float:
    return part / max(1, whole)


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
    new = plan.to_json()
    try:
        before = Plan.from_json(old, None)
        was = {s.name: (s, draws(old, s)) for s in before.stages}
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):
        raise UserError("--diff: this is not a plan of this version; plan again to compare with") from None
    why = [*settings("mix", before.config, plan.config), *documents(before, plan)]
    if not why and old["places"]["documents"] != new["places"]["documents"]:
        why = ["documents: others, of as many tokens, or in other places by their hashes"]
    yield from why[:SHOWN]
    if len(why) > SHOWN:
        yield f"and {len(why) - SHOWN} more"
    changed = set(was) - {s.name for s in plan.stages}
    yield from (f"stage {name}: is gone" for name in sorted(changed))
    for stage in plan.stages:
        if stage.name in was and was[stage.name][1] == draws(new, stage):
            yield f"stage {stage.name}: the same"
            continue
        changed.add(stage.name)
        if stage.name in was:
            yield f"stage {stage.name}: {'; '.join(moves(was[stage.name][0], stage))}"
        else:
            yield f"stage {stage.name}: is new, {stage.tokens:,} tokens"
    if not changed:
        yield "nothing changes for a run under way"
        return
    for name in (name for name in was if name in under_way):
        what = "would draw other documents, or others as often" if name in changed else "would be the same"
        yield f"stage {name} is {under_way[name]}, and {what}"
    yield "shards bear the fingerprint of their whole plan: jobs/mix.py would pack every stage again, under other names"


def draws(plan: dict[str, Any], stage: StagePlan) -> tuple[Any, ...]:
    """All that decides a stage's shards. plan: its JSON."""
    places = plan["places"]
    cuts = places["cuts"][stage.index : stage.index + 2]
    about = (stage.context, stage.rope_base, stage.long_documents, stage.shards, stage.densities)
    return plan["config"]["seed"], places["documents"], cuts, about


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


def documents(before: Plan, plan: Plan) -> Iterator[str]:
    """Cells with other tokens."""
    was, is_ = ({c.name: c.available for c in p.stages[0].cells} for p in (before, plan))
    for name in was | is_:
        if was.get(name, 0) != is_.get(name, 0):
            yield f"documents of {name}: {was.get(name, 0):,} -> {is_.get(name, 0):,} tokens"


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
