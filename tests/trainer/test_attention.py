"""Softmax attention against its definition, a masked softmax over complex rotations; LASP+ against one long slice."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import fused
from kernels.fused import rotate
from kernels.lightning_chunks import decay
from trainer import attention
from trainer.attention import Layout, lightning_attention, of_slice, rotary_angles, softmax_attention

F64 = torch.float64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=8)


@given(lengths, st.sampled_from([(4, 1), (4, 2), (2, 2)]), st.integers(0, 99))
def test_softmax_attention_is_a_masked_softmax(lengths, heads, seed):
    generator = torch.Generator().manual_seed(seed)
    cu = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    q = torch.randn(cu[-1], heads[0], 6, dtype=F64, generator=generator)
    k, v = torch.randn(2, cu[-1], heads[1], 6, dtype=F64, generator=generator)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(cu[-1], cu[-1], dtype=torch.bool).tril()
    repeat = heads[0] // heads[1]
    scores = torch.einsum("qhn,khn->hqk", q, k.repeat_interleave(repeat, 1)) * 6**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khn->qhn", weights, v.repeat_interleave(repeat, 1))
    torch.testing.assert_close(softmax_attention(q, k, v, Layout.of(cu, 4)), expected, rtol=1e-11, atol=1e-11)


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


@pytest.mark.parametrize("kernel", [False, True], ids=["plain", "triton"])
@pytest.mark.parametrize("ends", [[0, 96], [0, 10, 30, 90, 96], [0, 48, 96], [0, 8, 9, 94, 96]])
def test_slices_with_the_states_of_those_before_are_the_whole(ends, kernel, monkeypatch):
    """LASP+ on four ranks of 24 tokens, their all-gather put together here: outputs and gradients."""
    dtype, bound = (torch.float32, 1e-4) if kernel else (F64, 1e-11)
    if kernel:
        segments = pytest.importorskip("kernels.lightning_attention").Segments
        monkeypatch.setattr(fused, "on_gpu", lambda x: True)
    powers = decay(2, 1, 8, 16, torch.device(DEVICE), dtype)
    qkv, grad = torch.randn(96, 2, 48, dtype=dtype, device=DEVICE), torch.randn(96, 2, 16, dtype=dtype, device=DEVICE)
    whole, cut = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()

    layouts = []
    for rank in range(4):
        mesh = SimpleNamespace(get_local_rank=lambda rank=rank: rank, size=lambda: 4, get_group=lambda: None)
        layout = Layout.of(ends, 16, DEVICE, cp=mesh)
        layouts.append(replace(layout, segments=segments.of(layout.cu_seqlens, DEVICE) if kernel else None))
    finals = [of_slice(part, powers, layout)[1] for part, layout in zip(cut.split(24), layouts, strict=True)]
    monkeypatch.setattr(attention.AllGather, "apply", lambda final, group: torch.stack(finals))
    out = torch.cat([lightning_attention(*both) for both in zip(cut.split(24), [powers] * 4, layouts, strict=True)])

    monkeypatch.setattr(fused, "on_gpu", lambda x: False)
    expected = lightning_attention(whole, powers, Layout.of(ends, 16, DEVICE))
    pairs = (out, expected), (torch.autograd.grad(out, cut, grad)[0], torch.autograd.grad(expected, whole, grad)[0])
    assert all((a - b).norm() <= bound * b.norm() for a, b in pairs)
