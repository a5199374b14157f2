"""The chunked cross-entropy against torch's in float64, and that tokens x vocabulary never exist at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import head_loss as loss
from kernels.head_loss import head_loss


@given(st.integers(1, 30), st.integers(2, 13), st.integers(1, 9), st.integers(0, 1 << 30))
def test_loss_gradients_and_hits_are_cross_entropys(tokens, vocabulary, chunk, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 6, dtype=torch.float64, generator=g, requires_grad=True)
    weight = torch.randn(vocabulary, 6, dtype=torch.float64, generator=g, requires_grad=True)
    target = torch.randint(-1, vocabulary, (tokens,), generator=g)
    target[target < 0] = -100
    expected = F.cross_entropy(x @ weight.T, target, reduction="sum") * 3
    expected.backward()
    gradients = x.grad, weight.grad
    x.grad = weight.grad = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "CHUNK", chunk)
        total, nll, hit = head_loss(x, weight, target)
        (total * 3).backward()
    torch.testing.assert_close(total * 3, expected)
    torch.testing.assert_close(nll, F.cross_entropy(x @ weight.T, target, reduction="none"))
    torch.testing.assert_close((x.grad, weight.grad), gradients)
    assert torch.equal(hit, ((x @ weight.T).argmax(1) == target))
    with torch.no_grad():
        torch.testing.assert_close(head_loss(x, weight, target)[0], total)


class Largest(TorchDispatchMode):
    """The most elements that any tensor made by an operation has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.elements = max(self.elements, x.untyped_storage().nbytes() // 4 if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("gradient", [True, False])
def test_tokens_by_vocabulary_never_exist(gradient):
    tokens, vocabulary = 2048, 512
    x = torch.randn(tokens, 16, requires_grad=gradient)
    weight = torch.randn(vocabulary, 16, requires_grad=gradient)
    target = torch.randint(0, vocabulary, (tokens,))
    with Largest() as ours:
        total = head_loss(x, weight, target)[0]
        if gradient:
            total.backward()
    assert ours.elements <= loss.CHUNK * vocabulary
    with Largest() as torchs:
        F.cross_entropy(x @ weight.T, target)
    assert torchs.elements >= tokens * vocabulary  # the measure sees what it should
