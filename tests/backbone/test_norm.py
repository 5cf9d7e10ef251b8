"""RMSNorm and its hand-written backward against torch's own, and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.backbone.norm import RMSNorm

D, EPS = 16, 0.05  # an eps that shows beside inputs of any size below


def random_norm(d: int = D) -> RMSNorm:
    norm = RMSNorm(d, eps=EPS)
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_and_gradients_are_those_of_torch_in_float32(dtype: torch.dtype, scale: float) -> None:
    norm = random_norm()
    x = (scale * torch.randn(3, 5, D)).to(dtype).requires_grad_()
    upstream = torch.randn(3, 5, D).to(dtype)
    y = norm(x)
    expected = F.rms_norm(x.float(), (D,), norm.weight, EPS).to(dtype)
    assert y.dtype == dtype
    one_rounding = {"rtol": torch.finfo(dtype).eps, "atol": 0.0} if dtype != torch.float32 else {}
    torch.testing.assert_close(y, expected, **one_rounding)
    got = torch.autograd.grad(y, (x, norm.weight), upstream)
    wanted = torch.autograd.grad(expected, (x, norm.weight), upstream)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


def test_autocast_leaves_the_norm_in_float32() -> None:
    norm, x = random_norm(), torch.randn(2, 3, D)
    exact = norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), exact)


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)], ids=str)
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...], scale: float) -> None:
    norm = random_norm(4).double()

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    x = (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(normed, (x, norm.weight))
