"""Drawing one stage from one corpus partition: which documents, how often, and where they go in training order."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.storage import UserError, array_buffers, binary_array
from kernels.best_fit import copy_runs
from mixer.config import CLASSES, HELD_OUT, TIERS
from mixer.hashing import hashed
from mixer.inventory import WITHIN, draw_hash, parts
from mixer.plan import Plan, StagePlan

DRAWN = pa.schema(
    [
        ("window", pa.uint32()),
        ("order", pa.uint64()),
        ("doc", pa.uint64()),
        ("offset", pa.uint64()),
        ("copy", pa.uint16()),
        ("source", pa.uint16()),
        ("tier", pa.uint8()),
        ("length_class", pa.uint8()),
        ("ids", pa.large_binary()),
    ]
)
LAST_PLACE = 1 - 2.0**-32  # so that rounding in `copies + place` cannot reach the next whole number: the cap holds


def draw(inventory: pa.Table, tokens: pa.Table, plan: Plan, name: str) -> pa.Table:
    """The items (DRAWN) that a stage, or the held-out split, draws from a partition; by window and order.

    inventory: of `take_inventory`. tokens: the partition's doc and ids. An item is a document, or a part of one over
    the longest context of all stages (`parts`); the parts are the same in every stage, so the cap holds for each. A
    cell's items lie on a line by their hash; the curriculum walks along it, round after round, and every stage from
    where the one before it stopped, at a steady pace, or that of its source's density. So any part of a stage has its
    part of each cell but for an item, and a document comes again only when its cell has been gone through. `order` is
    the place in the stage as a fraction of 2^64, `copy` counts over all stages. No two copies share a window, unless
    the stage draws more copies than it has windows. A document that a stage does not split is drawn whole, as often as
    its first part.
    """
    stage = plan.stage(name)
    inventory = inventory.filter(pc.equal(inventory["held_out"], name == HELD_OUT))
    source = _source_codes(inventory, plan)
    tier, length_class = inventory["tier"].to_numpy(), inventory["length_class"].to_numpy()
    cell = _cell_numbers(plan, stage)[source, tier, length_class]
    if (cell < 0).any():
        raise UserError(f"stage {name}: a partition has documents in a cell the plan lacks; plan the mixture again")
    n_tokens = inventory["n_tokens"].to_numpy().astype(np.int64)
    part, offset, lengths = parts(n_tokens, max(s.context for s in (*plan.stages, plan.held_out)))
    if stage.long_documents != "split":
        part, offset, lengths = np.arange(len(n_tokens)), np.zeros_like(n_tokens), n_tokens
    doc = inventory["doc"].to_numpy()[part]
    hashes = hashed(plan.seed, f"order {name}", doc, offset)
    first, copies, begins, apart = _walk(draw_hash(plan.seed, doc, offset), hashes, cell[part], plan, stage)

    item = np.repeat(np.arange(len(doc)), copies)
    nth = np.arange(len(item)) - np.repeat(np.cumsum(copies) - copies, copies)
    place = np.clip(begins[item] + nth * apart[item], 0.0, LAST_PLACE)
    for code, knots in ((plan.sources.index(s), k) for s, k in stage.densities.items() if s in plan.sources):
        here = source[part[item]] == code
        place[here] = at_density(place[here], knots)
    order = ((place * 2.0**32).astype(np.uint64) << np.uint64(32)) | (hashes[item] >> np.uint64(32))
    window = _windows(order, item, nth, copies[item], stage.shards)
    copy = first[item] + nth
    sorted_ = np.lexsort((copy, offset[item], doc[item], order, window))
    item, of = item[sorted_], part[item[sorted_]]
    labels = [source[of], tier[of], length_class[of]]
    columns = [window[sorted_], order[sorted_], doc[item], offset[item], copy[sorted_], *labels]
    drawn = [pa.array(column).cast(field.type) for column, field in zip(columns, DRAWN, strict=False)]
    rows = inventory["row"].to_numpy()[of].astype(np.int64)
    if rows.max(initial=-1) >= len(tokens) or not np.array_equal(tokens["doc"].to_numpy()[rows], doc[item]):
        raise UserError("the tokens table has other documents than the inventory; take the inventory again")
    return pa.table([*drawn, _cut(tokens["ids"], rows, offset[item], lengths[item], n_tokens[of])], schema=DRAWN)


def at_density(place: np.ndarray, knots: list[tuple[float, float]]) -> np.ndarray:
    """Uniform places in [0, 1) moved to where a piecewise linear density wants them, in the same order.

    knots: as in StagePlan.densities. The inverse of the density's integral: within a piece, a root of a quadratic.
    """
    x, density = np.array(knots, np.float64).T
    areas = np.diff(x) * (density[1:] + density[:-1]) / 2
    below = np.concatenate([[0.0], np.cumsum(areas)])
    amount = place * below[-1]
    piece = np.clip(np.searchsorted(below, amount, side="right") - 1, 0, len(areas) - 1)
    rest, start, width = amount - below[piece], density[piece], np.diff(x)[piece]
    slope = (density[piece + 1] - start) / np.where(width, width, 1.0)
    root = start + np.sqrt(np.maximum(0.0, start**2 + 2 * slope * rest))
    return np.minimum(x[piece] + np.minimum(width, 2 * rest / np.where(root, root, 1.0)), LAST_PLACE)


def _windows(order: np.ndarray, item: np.ndarray, nth: np.ndarray, copies: np.ndarray, windows: int) -> np.ndarray:
    """The window of each place; where two copies of an item (in order) meet, the later one's is the next."""
    window = (((order >> np.uint64(32)) * np.uint64(windows)) >> np.uint64(32)).astype(np.int64)
    apart = np.maximum.accumulate(window - nth + item * windows * 2) - item * windows * 2 + nth
    apart = np.minimum(apart, windows - copies + nth)
    return np.where(copies <= windows, apart, window)


def _cut(
    ids: pa.ChunkedArray, rows: np.ndarray, offset: np.ndarray, lengths: np.ndarray, n_tokens: np.ndarray
) -> pa.LargeBinaryArray:
    """The ids of `lengths` tokens from `offset` on, of each of these rows."""
    data, bounds = array_buffers(ids)
    width = (bounds[rows + 1] - bounds[rows]) // np.maximum(n_tokens, 1)  # bytes per token, the same for all
    ends = np.concatenate([[0], np.cumsum(lengths * width)])
    out = np.empty(ends[-1], np.uint8)
    copy_runs(data, bounds[rows] + offset * width, lengths * width, out, ends[:-1])
    return binary_array(out, ends)


def _walk(
    draw_hashes: np.ndarray, hashes: np.ndarray, cell: np.ndarray, plan: Plan, stage: StagePlan
) -> tuple[np.ndarray, ...]:
    """Of each item: copies that earlier stages drew, copies that this one draws, where in the stage the first of them
    comes (about 0..1), and how far apart they are. The plan's table of places says how.

    Whether an item is drawn depends on the middle of its piece of the cell's line; its place in the stage is, by its
    hash, anywhere in that piece, so that small cells do not all come at the same moments.
    """
    table = plan.places.filter(pc.equal(plan.places["held_out"], stage.name == HELD_OUT))
    knots, cumulative, copies = (table[name].combine_chunks() for name in ("knots", "cumulative", "copies"))
    sizes = pc.list_value_length(knots).to_numpy(zero_copy_only=False).astype(np.int64)
    cells = np.repeat(np.arange(len(table)), sizes)
    lines = (cells << 32) | knots.flatten().to_numpy()
    piece = np.searchsorted(lines, (cell << 32) | draw_hashes, side="right") - 1
    exact = table["exact"].to_numpy()[cell]
    strange = exact & (lines[piece] != ((cell << 32) | draw_hashes))
    if (strange | (cells[piece] != cell)).any():
        raise UserError("a partition has documents that the plan's table of places lacks; plan the mixture again")
    cumulative = cumulative.flatten().to_numpy()
    left = cumulative[piece + cell]  # each cell's list has one more than it has knots
    size = cumulative[piece + cell + 1] - left
    bucket = (draw_hashes - (lines[piece] & 0xFFFFFFFF)) / 2.0**WITHIN
    drawn_at = np.minimum(left + np.where(exact, 0.5, bucket) * size, LAST_PLACE)
    comes_at = left + np.where(exact, hashes / 2.0**64, bucket) * size
    nth_stage, stages = (0, 1) if stage.name == HELD_OUT else (stage.index, len(plan.stages))
    before, after = copies.flatten().to_numpy().reshape(-1, stages + 1)[cell, nth_stage : nth_stage + 2].T
    first, last = (np.floor(cut + drawn_at).astype(np.int64) for cut in (before, after))
    if (last > table["cap"].to_numpy()[cell]).any():
        raise UserError(f"stage {stage.name} draws a document more often than its tier's cap; report it")
    apart = 1 / np.maximum(after - before, 1e-9)  # where nothing is drawn, nobody asks
    return first, last - first, (first + 1 - comes_at - before) * apart, apart


def _cell_numbers(plan: Plan, stage: StagePlan) -> np.ndarray:
    """(sources, tiers, classes) -> the cell's number in the stage, and in the plan's table of places; -1 for none."""
    numbers = np.full((len(plan.sources), len(TIERS), len(CLASSES)), -1)
    for number, cell in enumerate(stage.cells):
        numbers[plan.sources.index(cell.source), TIERS.index(cell.tier), CLASSES.index(cell.length_class)] = number
    return numbers


def _source_codes(inventory: pa.Table, plan: Plan) -> np.ndarray:
    codes = pc.index_in(inventory["source"].cast(pa.string()), pa.array(plan.sources, pa.string()))
    if codes.null_count:
        odd = pc.unique(inventory["source"].filter(pc.is_null(codes))).to_pylist()
        raise UserError(f"source {odd[0]!r} is not in the plan; plan the mixture again")
    return codes.to_numpy().astype(np.int64)
