"""Drawing one stage from one corpus partition: which documents, how often, and where they go in training order."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.storage import UserError
from mixer.config import CLASSES, HELD_OUT, TIERS
from mixer.hashing import hashed
from mixer.inventory import BUCKETS, WITHIN, draw_hash
from mixer.plan import Plan, StagePlan

DRAWN = pa.schema(
    [
        ("window", pa.uint32()),
        ("order", pa.uint64()),
        ("doc", pa.uint64()),
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

    inventory: of `take_inventory`. tokens: the partition's doc and ids. A document's copies are spread evenly over
    the stage from a start that is its hash; `order` is the place as a fraction of 2^64, `copy` counts over all stages.
    """
    stage = plan.stage(name)
    inventory = inventory.filter(pc.equal(inventory["held_out"], name == HELD_OUT))
    source = _source_codes(inventory, plan)
    tier, length_class = inventory["tier"].to_numpy(), inventory["length_class"].to_numpy()
    cell = _cell_numbers(plan, stage)[source, tier, length_class]
    if (cell < 0).any():
        raise UserError(f"stage {name}: a partition has documents in a cell the plan lacks; plan the mixture again")
    doc = inventory["doc"].to_numpy()
    place = _places(draw_hash(plan.seed, doc), cell, plan, stage)
    first = np.floor(np.array([c.copies_before for c in stage.cells])[cell] + place).astype(np.int64)
    copies = np.floor(np.array([c.copies_after for c in stage.cells])[cell] + place).astype(np.int64) - first

    item = np.repeat(np.arange(len(doc)), copies)
    nth = np.arange(len(item)) - np.repeat(np.cumsum(copies) - copies, copies)
    apart = np.uint64(2**64 - 1) // np.maximum(copies, 1).astype(np.uint64)
    order = hashed(plan.seed, f"order {name}", doc)[item] + nth.astype(np.uint64) * apart[item]
    window = ((order >> np.uint64(32)) * np.uint64(stage.shards)) >> np.uint64(32)
    copy = first[item] + nth
    sorted_ = np.lexsort((copy, doc[item], order))
    item = item[sorted_]

    rows = pa.array(inventory["row"].to_numpy()[item])
    columns = [window[sorted_], order[sorted_], doc[item], copy[sorted_], source[item], tier[item], length_class[item]]
    drawn = [pa.array(column).cast(field.type) for column, field in zip(columns, DRAWN, strict=False)]
    taken = tokens.select(["doc", "ids"]).take(rows)
    if not np.array_equal(taken["doc"].to_numpy(), doc[item]):
        raise UserError("the tokens table has other documents than the inventory; take the inventory again")
    return pa.table([*drawn, taken["ids"]], schema=DRAWN)


def _places(draw_hashes: np.ndarray, cell: np.ndarray, plan: Plan, stage: StagePlan) -> np.ndarray:
    """Each document's u in [0, 1): the part of its cell's tokens that lies before it."""
    held_out = plan.places["held_out"].to_numpy()
    lists = plan.places["cumulative"].combine_chunks()
    cumulative = lists.flatten().to_numpy().reshape(-1, BUCKETS + 1)[held_out == (stage.name == HELD_OUT)]
    bucket = (draw_hashes >> np.uint64(WITHIN)).astype(np.int64)
    within = (draw_hashes & np.uint64((1 << WITHIN) - 1)) / 2.0**WITHIN
    low, high = cumulative[cell, bucket], cumulative[cell, bucket + 1]
    return np.minimum(low + within * (high - low), LAST_PLACE)


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
