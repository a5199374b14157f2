"""Work on candidate pairs: sizes of set intersections, and the greedy choice of what to keep."""

import numpy as np

from kernels.jit import njit


@njit
def crowded(keys):
    """bool[keys]: true for every key that occurs more than once, and for a few that do not; no sorting.

    keys: uint64, as good as random in their lower bits.
    """
    slots = 1024
    while slots < 8 * len(keys):
        slots *= 2
    mask = np.uint64(slots - 1)
    seen = np.zeros(slots, np.uint8)
    for key in keys:
        seen[key & mask] = min(2, seen[key & mask] + 1)
    out = np.empty(len(keys), np.bool_)
    for i in range(len(keys)):
        out[i] = seen[keys[i] & mask] > 1
    return out


@njit
def intersections(values_a, offsets_a, rows_a, values_b, offsets_b, rows_b):
    """int64[pairs]: how many values set rows_a[i] of `a` shares with set rows_b[i] of `b`.

    values: uint64, each set sorted and without repeats; offsets: int64, one more than sets.
    """
    shared = np.zeros(len(rows_a), np.int64)
    for p in range(len(rows_a)):
        i, end_i = offsets_a[rows_a[p]], offsets_a[rows_a[p] + 1]
        j, end_j = offsets_b[rows_b[p]], offsets_b[rows_b[p] + 1]
        while i < end_i and j < end_j:
            a, b = values_a[i], values_b[j]
            shared[p] += a == b
            i += a <= b
            j += b <= a
    return shared


@njit
def distinct(values, offsets):
    """The values of sorted sets without their repeats: (values, offsets)."""
    out = np.empty(len(values), values.dtype)
    out_offsets = np.empty(len(offsets), np.int64)
    count = 0
    for d in range(len(offsets) - 1):
        out_offsets[d] = count
        for i in range(offsets[d], offsets[d + 1]):
            if i == offsets[d] or values[i] != values[i - 1]:
                out[count] = values[i]
                count += 1
    out_offsets[len(offsets) - 1] = count
    return out[:count], out_offsets


@njit
def keepers(nodes, later, earlier, weights):
    """(keeper, weight of the edge to it) of every node: int64[nodes], float64[nodes]; itself and 1 where it is kept.

    Nodes 0 .. nodes-1 are in keeper order; edges lead from `later` to an `earlier` node and are sorted by both. A node
    is removed if and only if an edge leads to a kept one; of several the heaviest, then the earliest, is its keeper.
    """
    keeper, weight = np.arange(nodes), np.ones(nodes)
    for e in range(len(later)):  # all edges of earlier nodes have been seen: whether those are kept is final
        node, candidate = later[e], earlier[e]
        if keeper[candidate] == candidate and (keeper[node] == node or weights[e] > weight[node]):
            keeper[node], weight[node] = candidate, weights[e]
    return keeper, weight
