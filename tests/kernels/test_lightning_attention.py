"""The Triton kernels under the interpreter (or on a GPU), beside the recurrence in float64."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from kernels import lightning_attention as kernel
from tests.kernels.test_lightning_chunks import recurrence

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def compare(lengths, heads, size, dtype, padding, slope, silu, bound):
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    cu_seqlens = [0, *torch.tensor(lengths).cumsum(0).tolist()]

    def made(*shape):
        return (torch.randn(*shape, generator=generator) / 2).to(DEVICE, dtype)

    tokens = cu_seqlens[-1] + padding
    slopes = torch.linspace(0, slope, heads).to(DEVICE)
    qkv, initial = made(tokens, heads, 3 * size), made(heads, size, size).float()
    grad, grad_final = made(tokens, heads, size), made(heads, size, size).float()

    exact = [x.double().requires_grad_() for x in (qkv, initial)]
    inputs = torch.nn.functional.silu(exact[0]) if silu else exact[0]
    wanted = recurrence(*inputs.split(size, dim=2), slopes.double(), cu_seqlens, exact[1])
    torch.autograd.backward(wanted, [grad.double(), grad_final.double()])
    given_ = [x.clone().requires_grad_() for x in (qkv, initial)]
    got = kernel.lightning_attention(given_[0], slopes, kernel.Segments.of(cu_seqlens, DEVICE), given_[1], silu=silu)
    torch.autograd.backward(got, [grad, grad_final])
    pairs = {
        "output": (got[0], wanted[0]),
        "state": (got[1], wanted[1]),
        "d qkv": (given_[0].grad, exact[0].grad),
        "d initial": (given_[1].grad, exact[1].grad),
    }
    for name, (ours, theirs) in pairs.items():
        assert error(ours, theirs) <= bound, name
    assert not got[0][cu_seqlens[-1] :].any()


@pytest.fixture(autouse=True, scope="module")
def small_segments():
    """So that short streams have documents of several segments and of partial chunks."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch.setattr(kernel, "CHUNK", 16)
            patch.setattr(kernel, "SEGMENT", 32)
        yield


@settings(max_examples=6, phases=[Phase.generate])  # the interpreter is slow: no shrinking
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    padding=st.sampled_from([0, 5]),
    slope=st.sampled_from([0.0, 0.05, 1.0, 40.0]),
    silu=st.booleans(),
)
def test_equals_the_recurrence_in_float32(lengths, heads, padding, slope, silu):
    compare(lengths, heads, 16, torch.float32, padding, slope, silu, 1e-4)


@pytest.mark.parametrize("size", [64, 128])
def test_head_sizes_in_float16(size):
    compare([50, 1, 33], 2, size, torch.float16, 3, 0.5, True, 1e-2)


def test_is_a_sound_operator():
    """Fake tensors, autograd registration and schema agree with what it does, also for a view of a wider tensor."""
    torch.manual_seed(0)
    wide = torch.randn(45, 2, 64, device=DEVICE)
    segments = kernel.Segments.of([0, 40, 45], DEVICE)
    arguments = (wide[:, :, :48], torch.ones(2, device=DEVICE), segments.table, segments.scans, segments.states, 45)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.trivium.lightning_attention.default, (*arguments, None, False), test_utils=tests)


def test_refuses_a_head_size_that_no_kernel_is_for():
    with pytest.raises(ValueError, match=r"N one of .*\(4, 1, 9\)"):
        kernel.lightning_attention(torch.randn(4, 1, 9), torch.ones(1), kernel.Segments.of([0, 4]))
