"""Norm, rotation and loss kernels, and their references, against torch's own operations and finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.kernels import cross_entropy_, load_native, norm_rotate, rms_norm
from engram.kernels.loss import cross_entropy_reference_
from engram.kernels.norm import (
    norm_rotate_backward_reference,
    norm_rotate_reference,
    rms_norm_backward_reference,
    rms_norm_reference,
)

EPS = 0.05


@pytest.fixture(autouse=True)
def _native() -> None:
    load_native()


def angles(T: int, half: int) -> tuple[Tensor, Tensor]:
    """Which also lengthen what they turn, as YaRN's do."""
    turn = torch.rand(T, half, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6
    return 1.2 * turn.cos(), 1.2 * turn.sin()


def by_complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension i and i + c/2 as the two parts of a number, turned."""
    half = x.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_heads_are_normed_and_turned(normed: bool, strided: bool) -> None:
    B, h, T, c = 2, 3, 5, 8
    x = torch.randn(B, T, h + 2, c, dtype=torch.float64)[:, :, 1:-1]  # as heads come out of one product
    x = (x if strided else x.contiguous()).requires_grad_()
    weight = torch.randn(c, dtype=torch.float64, requires_grad=True) if normed else None
    cos, sin = angles(T, c // 2)
    expected = by_complex_numbers(x if weight is None else F.rms_norm(x, (c,), weight, EPS), cos, sin)
    out = norm_rotate(x, weight, cos, sin, EPS)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(norm_rotate_reference(x, weight, cos, sin, EPS)[0], expected)
    leaves = [x] if weight is None else [x, weight]
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, leaves, grad)
    inverse = norm_rotate_reference(x, weight, cos, sin, EPS)[1].detach()
    by_hand = norm_rotate_backward_reference(grad, x.detach(), weight, cos, sin, inverse)
    for got in (torch.autograd.grad(out, leaves, grad), by_hand):
        for ours, theirs in zip(got, wanted, strict=False):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_heads_are_turned_in_float32(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 7, 3, 6).to(dtype), torch.rand(6)
    cos, sin = (a.float() for a in angles(7, 3))
    out = norm_rotate(x, weight, cos, sin, EPS)
    assert out.dtype == dtype
    exact = norm_rotate(x.double(), weight.double(), cos, sin, EPS)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


def test_the_norms_reference_is_the_norm() -> None:
    x, weight = torch.randn(4, 3, 10, dtype=torch.float64, requires_grad=True), torch.randn(10, dtype=torch.float64)
    weight.requires_grad_()
    expected = F.rms_norm(x, (10,), weight, EPS)
    out, inverse = rms_norm_reference(x, weight, EPS)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    wanted = torch.autograd.grad(expected, (x, weight), grad)
    for ours, theirs in zip(rms_norm_backward_reference(grad, x, weight, inverse), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "V"), [(1, 1), (9, 7), (40, 1000)])
def test_logits_turn_into_their_gradient(dtype: torch.dtype, N: int, V: int) -> None:
    logits, targets = (5 * torch.randn(N, V)).to(dtype), torch.randint(0, V, (N,))
    wide = logits.double().requires_grad_()
    losses = F.cross_entropy(wide, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum(), wide)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    for kernel in (cross_entropy_, cross_entropy_reference_):
        work = logits.clone()
        got = kernel(work, targets)
        torch.testing.assert_close(got.double(), losses.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(work.double(), gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_logit_breaks_its_loss_and_no_other(bad: float) -> None:
    logits = torch.randn(3, 40)
    logits[1, 17] = bad
    losses = cross_entropy_(logits, torch.tensor([0, 1, 2]))
    assert losses.isfinite().tolist() == [True, False, True]


def test_huge_logits_do_not_overflow() -> None:
    losses = cross_entropy_(torch.tensor([[3e38, -3e38, 0.0], [-3e4, 1.0, 1.0]]), torch.tensor([0, 1]))
    torch.testing.assert_close(losses, torch.tensor([0.0, 0.6931472]))


def test_the_operators_keep_their_promises_to_the_compiler() -> None:
    x = torch.randn(2, 5, 3, 8, requires_grad=True)
    cos, sin = (a.float() for a in angles(5, 4))
    torch.library.opcheck(torch.ops.engram.norm_rotate.default, (x, torch.rand(8, requires_grad=True), cos, sin, EPS))
    torch.library.opcheck(torch.ops.engram.norm_rotate.default, (x, None, cos, sin, EPS))
    torch.library.opcheck(torch.ops.engram.rms_norm.default, (x, torch.rand(8, requires_grad=True), EPS))
    torch.library.opcheck(torch.ops.engram.cross_entropy_.default, (torch.randn(4, 6), torch.tensor([0, 1, 5, 2])))


def test_the_norm_is_right_where_rows_are_not_side_by_side() -> None:
    x = torch.randn(4, 6, 10).transpose(0, 1)
    torch.testing.assert_close(rms_norm(x, torch.ones(10), EPS), F.rms_norm(x, (10,), None, EPS))


@pytest.mark.parametrize("bad", [-100, -1, 7])
def test_a_target_that_is_no_logit_is_refused_before_any_is_touched(bad: int) -> None:
    logits = torch.randn(3, 7)
    before = logits.clone()
    with pytest.raises(IndexError, match=f"target is {bad}: allowed is 0 to 6"):
        cross_entropy_(logits, torch.tensor([0, bad, 6]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("view", [lambda x: x[:, :7], lambda x: x[:, ::2], lambda x: x.T])
def test_logits_may_lie_anywhere_and_what_is_between_them_stays(view: Callable[[Tensor], Tensor]) -> None:
    ours, theirs = (torch.randn(6, 10, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    targets = torch.randint(0, 5, view(ours).shape[:1])
    torch.testing.assert_close(cross_entropy_(view(ours), targets), cross_entropy_reference_(view(theirs), targets))
    torch.testing.assert_close(ours, theirs)


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    x, cos = torch.randn(2, 5, 3, 8), torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"weight is \[8\]: allowed is \[16\]"):
        rms_norm(torch.randn(4, 16), torch.ones(8), EPS)
    for name, arguments in (
        ("x", (x[..., :7], None, cos, cos)),
        ("weight", (x, torch.ones(4), cos, cos)),
        ("cos", (x, None, cos[:4], cos)),
        ("sin", (x, None, cos, cos[:, :3])),
    ):
        with pytest.raises(ValueError, match=f"shape of {name} is"):
            norm_rotate(*arguments, EPS)
    with pytest.raises(ValueError, match=r"targets is \[3\]: allowed is \[4\]"):
        cross_entropy_(torch.randn(4, 6), torch.zeros(3, dtype=torch.int64))


def test_rows_of_nothing_have_a_norm_of_nothing() -> None:
    x, weight = torch.zeros(2, 0, requires_grad=True), torch.zeros(0, requires_grad=True)
    out = rms_norm(x, weight, EPS)
    out.sum().backward()
    assert out.shape == (2, 0)
