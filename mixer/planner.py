"""Making the plan from the summed inventories: who gets which tokens, or why that cannot be had and what would do."""

from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from typing import Any

import numpy as np

from dataprep.storage import UserError
from mixer import feasible
from mixer.allocate import largest_remainder
from mixer.config import CLASSES, HELD_OUT, MixConfig, Stage
from mixer.fit import Fit, fit
from mixer.places import places
from mixer.plan import CellPlan, Limit, Plan, StagePlan
from mixer.problem import Cells, Problem, build
from mixer.shares import densities
from mixer.whole import whole

SHOWN = 8  # cells named in a message


def make_plan(inventory: dict[str, Any], config: MixConfig) -> Plan:
    """Plan all stages together; UserError says what is missing, the nearest plan, and single changes that suffice.

    inventory: of `add_inventories`, taken with the same configuration; the order of its cells does not matter.
    """
    everything = sorted(inventory["cells"], key=lambda c: (c["source"], c["tier"], c["length_class"], c["held_out"]))
    cells = [cell for cell in everything if not cell["held_out"]]
    sources = sorted({cell["source"] for cell in everything})
    if mistakes := [*_source_mistakes(config, sources)]:
        raise UserError("\n".join(mistakes))
    if not cells:
        raise UserError(
            "mix: there is no document to train on; all were removed, taken down (mix.exclude) or held out "
            f"(mix.held_out.fraction {config.held_out.fraction:g}): add documents or lower these"
        )
    problem = build(cells, sources, config)
    planned, missing = feasible.nearest(problem)
    if missing.any():
        raise UserError("\n".join(_refusal(problem, planned, missing, cells, sources, config)))
    fitted = fit(problem)
    best, missing = whole(problem, fitted.x)
    if not missing.any():  # else rounding fails by a token, where caps of unlike stages bind everywhere
        planned = best

    stages: list[StagePlan] = []
    before = [Fraction(0)] * len(cells)
    for i, stage in enumerate(config.stages):
        after = [
            b + Fraction(int(t), max(1, c["usable"][i])) for b, t, c in zip(before, planned[i], cells, strict=True)
        ]
        whys = _whys(problem, fitted, i, planned[i])
        rows = [
            CellPlan(*_name(cell), cell["tokens"], cell["usable"][i], int(t), float(b), float(a), why)
            for cell, t, b, a, why in zip(cells, planned[i], before, after, whys, strict=True)
        ]
        asked = dict(zip(sources, problem.shares[i].tolist(), strict=True)) if problem.asked[i] else {}
        by_source = np.bincount(problem.source, planned[i], len(sources))
        course = _densities(problem, i, stage, sources, by_source)
        prices = _class_prices(problem, fitted, i)
        stages.append(_stage_plan(i, stage, rows, config, asked, course, prices))
        before = after
    held_out = _plan_held_out([cell for cell in everything if cell["held_out"]], config)
    return Plan(
        config=config.recipe,
        sources=tuple(sources),
        stages=tuple(stages),
        held_out=held_out,
        limits=tuple(_limits(problem, fitted, cells)),
        removed=inventory["removed"],
        places=places(everything, stages, held_out, config),
    )


def _source_mistakes(config: MixConfig, sources: list[str]) -> Iterator[str]:
    for i, stage in enumerate(config.stages):
        weights, late = stage.source_weights or {}, stage.blend.sources if stage.blend else {}
        for key, names in (("source_weights", weights), ("blend.sources", late)):
            for name in sorted(set(names) - set(sources)):
                yield (
                    f"mix.stages.{i}.{key}.{name}: no source of that name has documents left; there are "
                    f"{', '.join(sources) or 'none'}"
                )
        total = sum(weights.values())
        if (weights or late) and total < 1 - 1e-6 and set(sources) == set(weights) | set(late):
            yield (
                f"mix.stages.{i}.source_weights sum to {total:g} and no other source is left for the rest: "
                "they must sum to 1"
            )


def _refusal(
    p: Problem, planned: np.ndarray, missing: np.ndarray, cells: Cells, sources: list[str], config: MixConfig
) -> Iterator[str]:
    """What is missing and where, the nearest plan, and one change of each kind that would do."""
    yield f"this curriculum cannot be had: {int(missing.sum()):,} tokens are missing"
    for g, group in enumerate(p.groups):
        if missing[g]:
            stage = config.stages[group.stage]
            which = f"{group.length_class} documents" if group.length_class else "documents of all classes"
            yield (
                f"  stage {stage.name} (mix.stages.{group.stage}) needs {group.target:,} tokens of {which}; beside "
                f"the other stages' {group.target - int(missing[g]):,} can be drawn within the caps, "
                f"{int(missing[g]):,} are missing"
            )
            mine = np.nonzero(p.open[group.stage] & (p.group[group.stage] == g))[0]
            largest = sorted(mine, key=lambda c: (-int(p.usable[group.stage, c]), c))
            for c in largest[:SHOWN]:
                usable, cap = int(p.usable[group.stage, c]), int(p.cap[c])
                drawn = ", ".join(
                    f"{s.name} {int(t):,}" for s, t in zip(config.stages, planned[:, c], strict=True) if t
                )
                most = f"{usable:,} tokens x cap {cap} = {usable * cap:,}"
                yield f"    {'/'.join(_name(cells[c]))}: {most}; drawn: {drawn or 'none'}"
            if len(mine) > SHOWN:
                yield f"    and {len(mine) - SHOWN} smaller cells"
            if not len(mine):
                yield "    no cell that this stage may draw from"
    yield "the nearest plan that can be had:"
    for i, stage in enumerate(config.stages):
        parts = [
            f"{g.length_class or 'all'} {g.target - int(m):,}"
            for g, m in zip(p.groups, missing, strict=True)
            if g.stage == i
        ]
        yield f"  {stage.name}: {int(planned[i].sum()):,} of {stage.tokens:,} tokens ({', '.join(parts)})"
    found = [str(fix) for fix in feasible.fixes(p, cells, sources, config)]
    yield "any one of these changes is enough:" if found else "no single change of tokens, cap or shares is enough"
    yield from (f"  {fix}" for fix in found)


def _name(cell: dict[str, Any]) -> tuple[str, str, str]:
    return cell["source"], cell["tier"], cell["length_class"]


def _whys(p: Problem, fitted: Fit, i: int, planned: np.ndarray) -> Iterator[str]:
    for c, tokens in enumerate(planned.tolist()):
        if p.usable[i, c] == 0:
            yield "all longer than the context"
        elif p.copies[c] == 0:
            yield "copies 0"
        elif not p.open[i, c]:
            yield "weight 0"
        elif not p.allowed[i, c]:
            yield "share 0"
        else:
            yield "cap binds" if tokens and fitted.cap_price[c] > 0 else "in proportion"


def _limits(p: Problem, fitted: Fit, cells: Cells) -> Iterator[Limit]:
    for c in np.argsort(-fitted.cap_price * p.room / p.cap, kind="stable").tolist():  # most for a copy more first
        if fitted.cap_price[c] > 0:
            yield Limit(*_name(cells[c]), int(p.room[c]), float(fitted.cap_price[c]))


def _class_prices(p: Problem, fitted: Fit, i: int) -> dict[str, float]:
    prices = zip(p.groups, fitted.group_price.tolist(), strict=True)
    return {g.length_class: price for g, price in prices if g.stage == i and g.target and g.length_class}


def _densities(
    p: Problem, i: int, stage: Stage, sources: list[str], planned: np.ndarray
) -> dict[str, list[tuple[float, float]]]:
    if not (stage.transition or stage.blend):
        return {}
    course = p.courses[i]
    values = densities(course, planned)
    return {
        name: list(zip(course.x.tolist(), values[:, j].tolist(), strict=True))
        for j, name in enumerate(sources)
        if planned[j] > 0
    }


def _stage_plan(i: int, stage: Stage, rows: list[CellPlan], config: MixConfig, *asked: Any) -> StagePlan:
    """asked: the plan's `asked`, `densities` and `class_prices`."""
    tokens = sum(row.planned for row in rows)
    classes = {name: sum(row.planned for row in rows if row.length_class == name) for name in CLASSES}
    about = (stage.name, i, stage.context, stage.rope_base, tokens, stage.long_documents)
    return StagePlan(*about, ceil(tokens / config.shard_tokens), classes, tuple(rows), *asked)


def _plan_held_out(cells: Cells, config: MixConfig) -> StagePlan:
    """The held-out documents as they come, each at most once, up to the limit."""
    there = [cell["tokens"] for cell in cells]
    planned = largest_remainder(min(config.held_out.tokens, sum(there)), [Fraction(t) for t in there])
    rows = [
        CellPlan(*_name(cell), tokens, tokens, part, 0.0, part / tokens, "in proportion")
        for cell, tokens, part in zip(cells, there, planned, strict=True)
    ]
    context = config.held_out.context or config.stages[0].context
    stage = config.stages[0].model_copy(update={"name": HELD_OUT, "context": context, "long_documents": "split"})
    return _stage_plan(len(config.stages), stage, rows, config)
