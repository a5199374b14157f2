"""Softmax attention's products with their log-sum-exp, and their gradients, against float64."""

import pytest
import torch

from kernels.varlen_attention import attend, attend_backward

F64 = torch.float64

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
