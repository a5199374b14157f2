"""Lightning attention in plain PyTorch against its definition, a float64 recurrence."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from kernels import lightning_chunks
from kernels.lightning_chunks import Chunks, decay, lightning_attention, slopes

F64 = torch.float64
CPU = torch.device("cpu")
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def starts(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def recurrence(q, k, v, slope, cu, initial=None):
    """(output, the state after the last token): token by token, `initial` the state before the first document."""
    out, state = torch.zeros_like(v), initial
    for start, stop in itertools.pairwise(cu):
        if start or state is None:
            state = q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
        for t in range(start, stop):
            state = state * torch.exp(-slope)[:, None, None] + torch.einsum("hn,hm->hnm", k[t], v[t])
            out[t] = torch.einsum("hn,hnm->hm", q[t], state)
    return out, state


def chunked(q, k, v, powers, cu):
    document = torch.repeat_interleave(torch.tensor(cu).diff())
    return lightning_attention(torch.cat([q, k, v], dim=-1), powers, Chunks.of(document, powers.inner_H1BB.shape[-1]))


@given(
    lengths, st.sampled_from([1, 2, 4, 8, 16, 64]), st.sampled_from([1, 2, 3]), st.integers(0, 7), st.integers(0, 99)
)
def test_output_final_state_and_gradients_are_the_recurrence(lengths, block, heads, layer, seed):
    generator = torch.Generator().manual_seed(seed)
    cu = starts(lengths)
    q, k, v, g = torch.randn(4, cu[-1], heads, 6, dtype=F64, generator=generator)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    gradients = g, torch.randn(heads, 6, 6, dtype=F64, generator=generator)
    expected = recurrence(*map(F.silu, (q, k, v)), slopes(heads, layer, 8), cu)
    found = chunked(q, k, v, decay(heads, layer, 8, block, CPU, F64), cu)
    wanted = *expected, *torch.autograd.grad(expected, (q, k, v), gradients)
    for a, b in zip((*found, *torch.autograd.grad(found, (q, k, v), gradients)), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scan", [1, 2, 5, 32])
def test_scan_in_any_step_gives_the_same(scan, monkeypatch):
    decay.cache_clear()
    monkeypatch.setattr(lightning_chunks, "SCAN", scan)
    cu = starts([3, 50, 1, 130, 20])
    q, k, v = torch.randn(3, cu[-1], 2, 4, dtype=F64)
    out, _ = chunked(q, k, v, decay(2, 3, 8, 4, CPU, F64), cu)
    decay.cache_clear()
    expected, _ = recurrence(*map(F.silu, (q, k, v)), slopes(2, 3, 8), cu)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)


def test_half_precision_keeps_decay_in_float32():
    powers = decay(4, 0, 8, 16, CPU, torch.bfloat16)
    assert {p.dtype for name, p in vars(powers).items() if name != "slope_H"} == {torch.float32}
    assert powers.slope_H.dtype == F64
    cu = starts([100])
    q, k, v = torch.randn(3, 100, 4, 8, dtype=F64)
    expected, _ = recurrence(*map(F.silu, (q, k, v)), slopes(4, 0, 8), cu)
    out, _ = chunked(*(x.bfloat16() for x in (q, k, v)), powers, cu)
    assert (out.double() - expected).norm() < 0.02 * expected.norm()
