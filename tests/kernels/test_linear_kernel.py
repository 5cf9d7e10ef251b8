"""The linear map in float32 against float64, over panels, blocks and chunks of rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engram.kernels import linear, load_native


@pytest.fixture(autouse=True)
def _native() -> None:
    load_native()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("N", "K", "O"), [(1, 5, 3), (15, 64, 64), (16, 64, 64), (17, 33, 50), (700, 130, 600), (2300, 70, 65), (0, 8, 8)]
)
def test_it_is_as_close_to_float64_as_float32_can_be(N: int, K: int, O: int, biased: bool) -> None:  # noqa: E741
    x, weight = torch.randn(N, K, requires_grad=True), torch.randn(O, K, requires_grad=True)
    bias = torch.randn(O, requires_grad=True) if biased else None
    leaves = [one for one in (x, weight, bias) if one is not None]
    out = linear(x, weight, bias)
    exact = F.linear(*(None if one is None else one.double() for one in (x, weight, bias)))  # type: ignore[arg-type]
    grad = torch.randn(N, O)
    wanted = torch.autograd.grad(exact, leaves, grad.double())
    for ours, right in zip((out, *torch.autograd.grad(out, leaves, grad)), (exact.float(), *wanted), strict=True):
        assert ours.shape == right.shape
        assert (ours - right).norm() <= 1e-6 * right.norm()


def test_axes_before_the_last_stay_and_other_types_take_torchs() -> None:
    x, weight = torch.randn(2, 3, 20, 12), torch.randn(9, 12)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    arguments = (torch.randn(20, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True), torch.randn(4))
    torch.library.opcheck(torch.ops.engram.linear.default, arguments)


@pytest.mark.parametrize(("N", "K", "O"), [(32, 0, 16), (80, 0, 5), (80, 6, 0)])
def test_a_sum_of_nothing_is_zero(N: int, K: int, O: int) -> None:  # noqa: E741
    x, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((N, K), (O, K), (O,)))
    for spoilt in [torch.full((n,), 7.0) for n in (N * 16, N * 6, N * O, O * 16) for _ in range(9)]:
        del spoilt  # memory that is likely used again
    ours, torchs = linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(ours, torchs)
    grads, expected = (torch.autograd.grad(out.sum(), (x, weight, bias)) for out in (ours, torchs))
    for got, want in zip(grads, expected, strict=True):
        assert torch.equal(got, want)


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    x, weight = torch.randn(32, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match=r"weight is \[4, 8\]: allowed is \[4, 6\]"):
        linear(x[:, :6], weight)
    with pytest.raises(ValueError, match=r"bias is \[1\]: allowed is \[4\]"):
        linear(x, weight, torch.ones(1))
