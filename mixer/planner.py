"""Making the plan from the summed inventories: who gets which tokens, and whether the recipe can be had at all."""

from fractions import Fraction
from math import ceil, floor
from typing import Any

from dataprep.storage import UserError
from mixer.allocate import largest_remainder, water_fill
from mixer.config import CLASSES, HELD_OUT, MixConfig, Stage
from mixer.places import places
from mixer.plan import CellPlan, Plan, StagePlan

Cells = list[dict[str, Any]]


def make_plan(inventory: dict[str, Any], config: MixConfig) -> Plan:
    """Plan all stages; raises UserError with one line for everything that cannot be had.

    inventory: of `add_inventories`, taken with the same configuration. The last stages choose first: what is long is
    scarce, and they are about it. Within a stage and class, a cell gets tokens in proportion to its usable tokens x
    its tier's copies x its source's weight, up to what its tier's cap and the later stages leave of it.
    """
    cells = [cell for cell in inventory["cells"] if not cell["held_out"]]
    sources = sorted({cell["source"] for cell in inventory["cells"]})
    problems = _unknown_sources(config, sources)
    left = [Fraction(config.tiers[cell["tier"]].cap) for cell in cells]  # copies that no later stage has taken
    chosen: dict[int, tuple[list[int], list[str]]] = {}
    for i in reversed(range(len(config.stages))):
        usable = [cell["usable"][i] for cell in cells]
        limits = [floor(copies * tokens) for copies, tokens in zip(left, usable, strict=True)]
        chosen[i] = _choose(i, config, cells, limits, problems)
        left = [c - _copies(t, u) for c, t, u in zip(left, chosen[i][0], usable, strict=True)]
    if problems:
        raise UserError("\n".join(problems))

    stages = []
    before = [Fraction(0)] * len(cells)
    for i, stage in enumerate(config.stages):
        planned, why = chosen[i]
        usable = [cell["usable"][i] for cell in cells]
        after = [b + _copies(t, u) for b, t, u in zip(before, planned, usable, strict=True)]
        rows = [
            _cell_plan(*row)
            for row in zip(cells, usable, planned, map(float, before), map(float, after), why, strict=True)
        ]
        stages.append(_stage_plan(i, stage, stage.tokens, rows, config))
        before = after
    held_out = _plan_held_out([cell for cell in inventory["cells"] if cell["held_out"]], config)
    return Plan(
        seed=config.seed,
        sources=tuple(sources),
        thresholds=config.thresholds.model_dump(),
        stages=tuple(stages),
        held_out=held_out,
        removed=inventory["removed"],
        places=places(inventory["cells"], stages, held_out, config),
    )


def _unknown_sources(config: MixConfig, sources: list[str]) -> list[str]:
    return [
        f"mix.stages.{i}.source_weights.{name}: no source of that name has documents left; there are "
        f"{', '.join(sources) or 'none'}"
        for i, stage in enumerate(config.stages)
        for name in sorted(set(stage.source_weights or {}) - set(sources))
    ]


def _choose(
    index: int, config: MixConfig, cells: Cells, limits: list[int], problems: list[str]
) -> tuple[list[int], list[str]]:
    """Tokens of each cell for one stage, and why; what cannot be had is added to `problems`."""
    stage = config.stages[index]
    weights = [
        cell["usable"][index]
        * Fraction(config.tiers[cell["tier"]].copies)
        * Fraction((stage.source_weights or {}).get(cell["source"], 1.0))
        for cell in cells
    ]
    planned, why = [0] * len(cells), [""] * len(cells)
    for length_class, wanted in _targets(stage).items():
        members = [c for c, cell in enumerate(cells) if length_class in (None, cell["length_class"])]
        parts = water_fill(wanted, [weights[c] for c in members], [limits[c] for c in members])
        if sum(parts) < wanted:
            problems.append(_problem(index, stage, length_class, wanted, sum(parts)))
        for c, part in zip(members, parts, strict=True):
            planned[c] = part
            why[c] = _why(cells[c]["usable"][index], weights[c], wanted, part, limits[c])
    return planned, why


def _targets(stage: Stage) -> dict[str | None, int]:
    """Tokens by length class; under None where the classes come as they come."""
    if stage.shares is None:
        return {None: stage.tokens}
    shares = [Fraction(getattr(stage.shares, name)) for name in CLASSES]
    return dict(zip(CLASSES, largest_remainder(stage.tokens, shares), strict=True))


def _why(usable: int, weight: Fraction, wanted: int, part: int, limit: int) -> str:
    if usable == 0:
        return "all longer than the context"
    if weight == 0:
        return "weight 0"
    if wanted == 0:
        return "share 0"
    return "cap binds" if part == limit else "in proportion"


def _problem(index: int, stage: Stage, length_class: str | None, wanted: int, there: int) -> str:
    """What is missing, and what would do: for the caps, fewer tokens or another share."""
    which = f"of {length_class} documents" if length_class else "in all"
    fixes = [f"lower mix.stages.{index}.tokens to {there * stage.tokens // wanted}"] if there else []
    if length_class:
        fixes.append(f"lower mix.stages.{index}.shares.{length_class} to {floor(1e4 * there / stage.tokens) / 1e4:g}")
    fixes += ["raise mix.tiers.*.cap", "add documents"]
    return (
        f"stage {stage.name} needs {wanted} tokens {which}; {there} can be drawn within the tiers' caps and what later "
        f"stages take, {wanted - there} are missing: {', '.join(fixes[:-1])} or {fixes[-1]}"
    )


def _copies(planned: int, usable: int) -> Fraction:
    return Fraction(planned, usable) if usable else Fraction(0)


def _cell_plan(cell: dict[str, Any], usable: int, planned: int, before: float, after: float, why: str) -> CellPlan:
    return CellPlan(
        cell["source"], cell["tier"], cell["length_class"], cell["tokens"], usable, planned, before, after, why
    )


def _stage_plan(index: int, stage: Stage, tokens: int, rows: list[CellPlan], config: MixConfig) -> StagePlan:
    return StagePlan(
        name=stage.name,
        index=index,
        context=stage.context,
        rope_base=stage.rope_base,
        tokens=tokens,
        long_documents=stage.long_documents,
        shards=ceil(tokens / config.shard_tokens),
        classes={name: sum(row.planned for row in rows if row.length_class == name) for name in CLASSES},
        cells=tuple(rows),
    )


def _plan_held_out(cells: Cells, config: MixConfig) -> StagePlan:
    """The held-out documents as they come, each at most once, up to the limit."""
    there = [cell["tokens"] for cell in cells]
    tokens = min(config.held_out.tokens, sum(there))
    planned = largest_remainder(tokens, [Fraction(t) for t in there])
    rows = [_cell_plan(c, t, p, 0.0, p / t, "in proportion") for c, t, p in zip(cells, there, planned, strict=True)]
    first = config.stages[0]
    context = config.held_out.context or first.context
    stage = first.model_copy(update={"name": HELD_OUT, "context": context, "long_documents": "split"})
    return _stage_plan(len(config.stages), stage, tokens, rows, config)
