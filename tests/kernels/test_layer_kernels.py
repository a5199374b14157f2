"""The one-pass kernels of a layer under the interpreter (or on a GPU), beside plain PyTorch in float64."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

pytest.importorskip("triton")

from kernels import experts, gated_norm, permute, rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATOR = ("test_schema", "test_autograd_registration", "test_faketensor")
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2}
few = settings(max_examples=5, phases=[Phase.generate])  # the interpreter is slow: no shrinking
dtypes = st.sampled_from(list(BOUNDS))
seeds = st.integers(0, 9999)


class Made:
    """Random tensors of one type, and comparison of what comes of them and of their float64 copies."""

    def __init__(self, seed, dtype):
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)

    def compare(self, kernel, plain, *inputs):
        """Outputs and the gradients of all inputs, under random gradients of the outputs."""
        ours, theirs = ([x.detach().to(d).requires_grad_() for x in inputs] for d in (self.dtype, torch.float64))
        got, wanted = kernel(*ours), plain(*theirs)
        got, wanted = ((x,) if isinstance(x, torch.Tensor) else x for x in (got, wanted))
        grads = [self(*x.shape) for x in got]
        torch.autograd.backward(got, grads)
        torch.autograd.backward(wanted, [g.double() for g in grads])
        pairs = [*zip(got, wanted, strict=True), *((a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))]
        for number, (a, b) in enumerate(pairs):
            assert a.dtype == self.dtype and close(a, b, BOUNDS[self.dtype]), number


def close(got, wanted, bound):
    return (got.double() - wanted).norm() <= bound * wanted.norm()


@few
@given(st.integers(1, 40), st.sampled_from([16, 48, 130]), dtypes, seeds)
def test_gated_norm(tokens, width, dtype, seed):
    def plain(x, gate, weight):
        return F.rms_norm(x, weight.shape, weight, 1e-6) * gate.sigmoid()

    made = Made(seed, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated_norm, "PARTS", 7)  # so that a program has several rows
        made.compare(
            lambda *x: gated_norm.gated_norm(*x, 1e-6), plain, made(tokens, width), 3 * made(tokens, width), made(width)
        )


def test_gated_norm_of_zeros_is_zero():
    x = torch.zeros(2, 8, device=DEVICE, requires_grad=True)
    out = gated_norm.gated_norm(x, torch.ones_like(x), torch.ones(8, device=DEVICE), 1e-6)
    out.sum().backward()
    assert not out.any() and x.grad.isfinite().all()


@few
@given(st.integers(1, 30), st.integers(1, 4), st.sampled_from([8, 33]), dtypes, st.booleans(), seeds)
def test_spread_and_combine(tokens, copies, width, dtype, weighted, seed):
    made = Made(seed, dtype)
    place = torch.randperm(tokens * copies, generator=made.generator).view(tokens, copies).to(DEVICE)
    source = place.flatten().argsort() // copies  # of each row, its token
    made.compare(lambda x: permute.spread(x, place), lambda x: x[source], made(tokens, width))
    rows, weight = made(tokens * copies, width), made(tokens, copies)
    if weighted:
        made.compare(
            lambda y, w: permute.combine(y, place, w), lambda y, w: (y[place] * w[:, :, None]).sum(1), rows, weight
        )
    else:
        made.compare(lambda y: permute.combine(y, place), lambda y: y[place].sum(1), rows)


@few
@given(st.integers(1, 300), st.sampled_from([1, 5, 17, 33]), seeds)
def test_counting_sort_is_a_stable_sort(rows, kinds, seed):
    kind = torch.randint(kinds, (rows,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permute, "COUNTED", 1024)  # so that there are several blocks
        order, place, count = permute.sorted_by(kind, kinds)
    assert torch.equal(order, kind.argsort(stable=True))
    assert torch.equal(place[order], torch.arange(rows, device=DEVICE))
    assert torch.equal(count, kind.bincount(minlength=kinds))


@few
@given(st.integers(1, 20), st.sampled_from([8, 40]), dtypes, seeds)
def test_swiglu(rows, width, dtype, seed):
    made = Made(seed, dtype)
    gate_up, grad = 2 * made(rows, 2 * width), made(rows, width)
    exact = gate_up.double().requires_grad_()
    gate, up = exact.chunk(2, dim=1)
    wanted = F.silu(gate) * up
    wanted.backward(grad.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "BLOCK", 16)
        d_gate_up, again = experts.swiglu_backward(gate_up, grad)
        for got, expected in ((experts.swiglu(gate_up), wanted), (again, wanted), (d_gate_up, exact.grad)):
            assert close(got, expected, BOUNDS[dtype])


@pytest.mark.parametrize("count", [[0, 0], [3, 61], [64, 0], [70, 60], [100, 40]])
def test_clears_the_rows_behind_and_no_others(count):
    x = torch.full((140, 130), torch.nan, device=DEVICE)
    x[: sum(count)] = 1
    out = experts.clear_behind(x, torch.tensor(count, device=DEVICE))
    assert (out[: sum(count)] == 1).all() and (out[sum(count) :] == 0).all()


@few
@given(
    st.integers(1, 40), st.sampled_from([(1, 1), (4, 2)]), st.sampled_from([(16, 8), (24, 6), (8, 4)]), dtypes, seeds
)
def test_rotary(tokens, heads, sizes, dtype, seed):
    (size, half), made = sizes, Made(seed, dtype)
    angle = torch.rand(tokens, 1, half, generator=made.generator).to(DEVICE) * 100
    cos, sin = angle.cos(), angle.sin()

    def plain(*tensors):
        parts = (x.split([half, half, size - 2 * half], dim=2) for x in tensors)
        return tuple(torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=2) for a, b, rest in parts)

    made.compare(
        lambda q, k: rotary.rotate(q, k, cos, sin), plain, made(tokens, heads[0], size), made(tokens, heads[1], size)
    )


def test_are_sound_operators():
    """Fake tensors, autograd registration and schema agree with what they do, also for views."""
    x = torch.randn(6, 20, device=DEVICE)[:, :16].requires_grad_()
    place = torch.randperm(12).view(6, 2).to(DEVICE)
    weight = torch.rand(6, 2, device=DEVICE, requires_grad=True)
    cos = torch.rand(6, 1, 4, device=DEVICE)
    operators = torch.ops.trivium
    for operator, arguments in {
        operators.gated_norm: (x, x.detach() + 1, torch.ones(16, device=DEVICE), 1e-6),
        operators.spread: (x, place),
        operators.combine: (torch.randn(12, 8, device=DEVICE, requires_grad=True), place, weight),
        operators.rotate: (x.unflatten(1, (2, 8)), x.unflatten(1, (1, 16)), cos, cos, False),
    }.items():
        torch.library.opcheck(operator.default, arguments, test_utils=OPERATOR)
