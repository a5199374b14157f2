"""Drawing one stage from one corpus partition: which documents, how often, and where they go in training order."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dataprep.storage import UserError, array_buffers, binary_array
from kernels.best_fit import copy_runs
from mixer.config import CLASSES, HELD_OUT, TIERS
from mixer.hashing import hashed
from mixer.inventory import BUCKETS, WITHIN, draw_hash
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

    inventory: of `take_inventory`. tokens: the partition's doc and ids. A document over the longest context of all
    stages will be split anyway: its parts of that length, from token `offset` on, are items of their own, so that one
    huge document does not part drawn tokens from planned ones. The parts are the same in every stage, so the cap holds
    for each. An item's copies are spread evenly over the stage from a start that is the document's hash; `order` is
    the place as a fraction of 2^64, `copy` counts over all stages.
    """
    stage = plan.stage(name)
    inventory = inventory.filter(pc.equal(inventory["held_out"], name == HELD_OUT))
    source = _source_codes(inventory, plan)
    tier, length_class = inventory["tier"].to_numpy(), inventory["length_class"].to_numpy()
    cell = _cell_numbers(plan, stage)[source, tier, length_class]
    if (cell < 0).any():
        raise UserError(f"stage {name}: a partition has documents in a cell the plan lacks; plan the mixture again")
    n_tokens = inventory["n_tokens"].to_numpy().astype(np.int64)
    longest = max(s.context for s in (*plan.stages, plan.held_out))
    number = -(-n_tokens // longest) if stage.long_documents == "split" else np.ones_like(n_tokens)
    part = np.repeat(np.arange(len(number)), number)  # the document of each
    offset = (np.arange(len(part)) - np.repeat(np.cumsum(number) - number, number)) * longest
    doc, cell, n_tokens = inventory["doc"].to_numpy()[part], cell[part], n_tokens[part]
    place = _places(draw_hash(plan.seed, doc), offset / np.maximum(n_tokens, 1), cell, plan, stage)
    first = np.floor(np.array([c.copies_before for c in stage.cells])[cell] + place).astype(np.int64)
    copies = np.floor(np.array([c.copies_after for c in stage.cells])[cell] + place).astype(np.int64) - first

    item = np.repeat(np.arange(len(doc)), copies)
    nth = np.arange(len(item)) - np.repeat(np.cumsum(copies) - copies, copies)
    apart = np.uint64(2**64 - 1) // np.maximum(copies, 1).astype(np.uint64)
    order = hashed(plan.seed, f"order {name}", doc)[item] + nth.astype(np.uint64) * apart[item]
    window = ((order >> np.uint64(32)) * np.uint64(stage.shards)) >> np.uint64(32)
    copy = first[item] + nth
    sorted_ = np.lexsort((copy, offset[item], doc[item], order))
    item, of = item[sorted_], part[item[sorted_]]
    labels = [source[of], tier[of], length_class[of]]
    columns = [window[sorted_], order[sorted_], doc[item], offset[item], copy[sorted_], *labels]
    drawn = [pa.array(column).cast(field.type) for column, field in zip(columns, DRAWN, strict=False)]
    rows = inventory["row"].to_numpy()[of].astype(np.int64)
    if rows.max(initial=-1) >= len(tokens) or not np.array_equal(tokens["doc"].to_numpy()[rows], doc[item]):
        raise UserError("the tokens table has other documents than the inventory; take the inventory again")
    lengths = n_tokens[item] - offset[item]
    if stage.long_documents == "split":
        lengths = np.minimum(lengths, longest)
    return pa.table([*drawn, _cut(tokens["ids"], rows, offset[item], lengths, n_tokens[item])], schema=DRAWN)


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


def _places(draw_hashes: np.ndarray, into: np.ndarray, cell: np.ndarray, plan: Plan, stage: StagePlan) -> np.ndarray:
    """Each item's u in [0, 1): the part of its cell's tokens that lies before it.

    into: the part of its document that lies before it. A huge document fills most of its bucket; its parts take
    their places around the bucket, from where its hash puts the first.
    """
    held_out = plan.places["held_out"].to_numpy()
    lists = plan.places["cumulative"].combine_chunks()
    cumulative = lists.flatten().to_numpy().reshape(-1, BUCKETS + 1)[held_out == (stage.name == HELD_OUT)]
    bucket = (draw_hashes >> np.uint64(WITHIN)).astype(np.int64)
    within = ((draw_hashes & np.uint64((1 << WITHIN) - 1)) / 2.0**WITHIN + into) % 1.0
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
