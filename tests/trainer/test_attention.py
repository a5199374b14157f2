"""Both attentions against their definitions: a float64 recurrence, and a masked softmax over complex rotations."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from trainer import attention
from trainer.attention import Layout, decay, in_chunks, rotary_angles, rotate, slopes, softmax_attention
from trainer.ring import attend, attend_backward

F64 = torch.float64
CPU = torch.device("cpu")
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


def starts(lengths):
    return [0, *torch.tensor(lengths).cumsum(0).tolist()]


def recurrence(q, k, v, slope, cu):
    out = torch.zeros_like(v)
    for start, stop in itertools.pairwise(cu):
        state = torch.zeros(q.shape[1], q.shape[2], v.shape[2], dtype=q.dtype)
        for t in range(start, stop):
            state = state * torch.exp(-slope)[:, None, None] + torch.einsum("hn,hm->hnm", k[t], v[t])
            out[t] = torch.einsum("hn,hnm->hm", q[t], state)
    return out


@given(
    lengths, st.sampled_from([1, 2, 4, 8, 16, 64]), st.sampled_from([1, 2, 3]), st.integers(0, 7), st.integers(0, 99)
)
def test_lightning_is_the_recurrence(lengths, block, heads, layer, seed):
    generator = torch.Generator().manual_seed(seed)
    cu = starts(lengths)
    q, k, v, g = torch.randn(4, cu[-1], heads, 6, dtype=F64, generator=generator)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    expected = recurrence(*map(F.silu, (q, k, v)), slopes(heads, layer, 8), cu)
    out = in_chunks(torch.cat([q, k, v], dim=-1), decay(heads, layer, 8, block, CPU, F64), Layout.of(cu, block))
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(expected, (q, k, v), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scan", [1, 2, 5, 32])
def test_scan_in_any_step_gives_the_same(scan, monkeypatch):
    attention.decay.cache_clear()
    monkeypatch.setattr(attention, "SCAN", scan)
    cu = starts([3, 50, 1, 130, 20])
    q, k, v = torch.randn(3, cu[-1], 2, 4, dtype=F64)
    out = in_chunks(torch.cat([q, k, v], dim=-1), decay(2, 3, 8, 4, CPU, F64), Layout.of(cu, 4))
    attention.decay.cache_clear()
    torch.testing.assert_close(out, recurrence(*map(F.silu, (q, k, v)), slopes(2, 3, 8), cu), rtol=1e-11, atol=1e-11)


def test_half_precision_keeps_decay_in_float32():
    powers = decay(4, 0, 8, 16, CPU, torch.bfloat16)
    assert {p.dtype for name, p in vars(powers).items() if name != "slope_H111"} == {torch.float32}
    assert powers.slope_H111.dtype == F64
    cu = starts([100])
    q, k, v = torch.randn(3, 100, 4, 8, dtype=F64)
    expected = recurrence(*map(F.silu, (q, k, v)), slopes(4, 0, 8), cu)
    out = in_chunks(torch.cat([q, k, v], dim=-1).bfloat16(), powers, Layout.of(cu, 16))
    assert (out.double() - expected).norm() < 0.02 * expected.norm()


@given(lengths, st.sampled_from([(4, 1), (4, 2), (2, 2)]), st.integers(0, 99))
def test_softmax_attention_is_a_masked_softmax(lengths, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    cu = starts(lengths)
    q = torch.randn(cu[-1], heads[0], 6, dtype=F64, generator=generator)
    k, v = torch.randn(2, cu[-1], heads[1], 6, dtype=F64, generator=generator)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(cu[-1], cu[-1], dtype=torch.bool).tril()
    repeat = heads[0] // heads[1]
    scores = torch.einsum("qhn,khn->hqk", q, k.repeat_interleave(repeat, 1)) * 6**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khn->qhn", weights, v.repeat_interleave(repeat, 1))
    torch.testing.assert_close(softmax_attention(q, k, v, Layout.of(cu, 4)), expected, rtol=1e-11, atol=1e-11)


gpu = pytest.param("cuda", torch.bfloat16, 0.02, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU"))


@pytest.mark.parametrize(("device", "dtype", "bound"), [("cpu", F64, 1e-11), gpu])
def test_products_of_the_ring_and_their_gradients(device, dtype, bound):
    """Documents with a mask, and all keys without one; two query heads share one of keys and values."""
    q, both, grad = (torch.randn(70, 4, 16, dtype=dtype, device=device, requires_grad=True) for _ in range(3))
    for cu, causal in (([0, 5, 40, 70], True), ([0, 70], False)):
        document = torch.repeat_interleave(torch.tensor(cu).diff()).to(device)
        hidden = (document[:, None] != document) | (torch.ones(70, 70, device=device).triu(1).bool() & causal)
        k, v = (x.repeat_interleave(2, 1) for x in both.to(F64).chunk(2, 1))
        score = torch.einsum("thn,shn->hts", q.to(F64), k).masked_fill(hidden, -torch.inf) / 4
        expected = torch.einsum("hts,shn->thn", score.softmax(-1), v)
        out, lse = attend(q, both, cu, cu, causal)
        gradients = attend_backward(grad, out, lse.contiguous(), q, both, cu, cu, causal)
        wanted = torch.autograd.grad(expected, (q, both), grad.to(F64))
        pairs = zip((out, lse, *gradients), (expected, score.logsumexp(-1).mT, *wanted), strict=True)
        assert all((a.to(F64) - b).norm() <= bound * b.norm() for a, b in pairs)


def test_rotation_is_complex_multiplication_and_partial():
    layout = Layout.of([0, 5, 12], 4)
    assert layout.position_T.tolist() == [*range(5), *range(7)]
    x = torch.randn(12, 2, 10, dtype=F64)
    out = rotate(x, *rotary_angles(layout.position_T, 6, 1e4, F64))
    turn = torch.polar(
        torch.ones(12, 3, dtype=F64), layout.position_T[:, None] * 1e4 ** -(torch.arange(3, dtype=F64) / 3)
    )
    expected = torch.complex(x[..., :3], x[..., 3:6]) * turn[:, None]
    torch.testing.assert_close(torch.complex(out[..., :3], out[..., 3:6]), expected)
    assert torch.equal(out[..., 6:], x[..., 6:])


def test_angles_at_a_million_tokens():
    position = torch.tensor([1_000_003])
    cos, sin = rotary_angles(position, 64, 1e7, torch.float32)
    exact = [(1_000_003 * 1e7 ** (-i / 32)) for i in range(32)]
    torch.testing.assert_close(cos.flatten(), torch.tensor(exact, dtype=F64).cos().float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.flatten(), torch.tensor(exact, dtype=F64).sin().float(), rtol=0, atol=1e-6)
