"""Targets, boundaries, sources and padding, against a token-by-token reading of the segments."""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixer.reader import Batch
from mixer.shards import SEGMENT
from trainer.data import NO_TARGET, pack

CONTEXT = 12
rows = st.lists(st.lists(st.integers(1, CONTEXT), min_size=0, max_size=5), min_size=1, max_size=4)


def batch(lengths_by_row):
    tokens = np.arange(1, len(lengths_by_row) * CONTEXT + 1, dtype=np.uint16).reshape(-1, CONTEXT)
    segments = []
    for row, lengths in enumerate(lengths_by_row):
        start = 0
        for wanted in lengths:
            length = min(wanted, CONTEXT - start)
            if length:
                segments.append((row, start, length, 0, 0, 0, len(segments) % 3, 0, 0))
            start += length
    return Batch(tokens, np.array(segments, SEGMENT))


@given(rows)
def test_every_token_by_hand(lengths_by_row):
    data = batch(lengths_by_row)
    packed = pack(data, block=4)
    targets = np.full(data.tokens.size, NO_TARGET)
    sources = np.full(data.tokens.size, -1)
    positions = np.zeros(data.tokens.size, int)
    end_of_row = {}
    for s in data.segments:
        for i in range(s["length"]):
            t = s["sequence"] * CONTEXT + s["start"] + i
            sources[t], positions[t] = s["source"], i
            if i + 1 < s["length"]:
                targets[t] = data.tokens.flat[t + 1]
        end_of_row[s["sequence"]] = s["start"] + s["length"]
    for row in range(len(data.tokens)):  # the padding of a row is one more document
        start = end_of_row.get(row, 0)
        positions[row * CONTEXT + start : (row + 1) * CONTEXT] = np.arange(CONTEXT - start)
    assert packed.target_T.tolist() == targets.tolist()
    codes = data.segments["source"].astype(int)[packed.segment_T] if len(data.segments) else sources
    assert np.where(packed.real_T, codes, -1).tolist() == sources.tolist()
    assert packed.layout.position_T.tolist() == positions.tolist()
    assert packed.token_T.tolist() == data.tokens.ravel().tolist()
    assert packed.real_T.sum() == data.segments["length"].sum()


def test_eos_is_learned_but_what_follows_it_is_not():
    data = batch([[3, 4]])
    packed = pack(data, block=4)
    assert packed.target_T.tolist()[:7] == [2, 3, NO_TARGET, 5, 6, 7, NO_TARGET]


def test_a_masked_batch_counts_for_nothing():
    packed = pack(batch([[3, 4]]), block=4, masked=True)
    assert not packed.real_T.any() and (packed.target_T == NO_TARGET).all()


@given(rows, st.integers(1, 3), st.sampled_from([2, 3, 4]))
def test_slices_of_context_parallel_ranks_make_up_the_whole(lengths_by_row, together, ranks):
    data = batch(lengths_by_row)
    whole = pack(data, block=4, together=together)
    meshes = [SimpleNamespace(size=lambda: ranks, get_local_rank=lambda r=r: r) for r in range(ranks)]
    slices = [pack(data, 4, together=together, cp=mesh) for mesh in meshes]
    for name in ("token_T", "target_T", "segment_T"):
        assert torch.equal(torch.cat([getattr(s, name) for s in slices]), getattr(whole, name))
    for name in ("position_T", "group_T"):
        assert torch.equal(torch.cat([getattr(s.layout, name) for s in slices]), getattr(whole.layout, name))
    expected = np.arange(data.tokens.size) // (CONTEXT * together)
    assert whole.layout.group_T.tolist() == np.where(whole.segment_T < 0, -1, expected).tolist()
    assert torch.equal(torch.cat([s.layout.member_GT for s in slices], dim=1), whole.layout.member_GT)
