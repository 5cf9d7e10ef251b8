"""Hyper-connections' operators: kernels and references against their equations written out, and finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engram.kernels import load_native, read_branches, sinkhorn, write_branches
from engram.kernels.sinkhorn import (
    read_branches_backward_reference,
    read_branches_reference,
    sinkhorn_backward_reference,
    sinkhorn_reference,
    write_branches_backward_reference,
    write_branches_reference,
)

STEPS = 20


@pytest.fixture(autouse=True)
def _native() -> None:
    load_native()


def in_logarithms(logits: Tensor, steps: int) -> Tensor:
    """The same steps on the logarithm, from which each sum's is subtracted."""
    for _ in range(steps):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


def narrow(*like: Tensor) -> float:
    return max({torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-7}[x.dtype] for x in like)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 2, STEPS])
@pytest.mark.parametrize(("shape", "M"), [((2, 3), 4), ((50,), 3), ((1,), 1), ((16,), 8), ((0,), 4), ((), 2)])
def test_steps_and_their_gradient_are_those_in_logarithms(
    shape: tuple[int, ...], M: int, steps: int, dtype: torch.dtype
) -> None:
    logits, grad = (3 * torch.randn(*shape, M, M).to(dtype) for _ in range(2))
    wide, logits = logits.double().requires_grad_(), logits.requires_grad_()
    expected = in_logarithms(wide, steps)
    (wanted,) = torch.autograd.grad(expected, wide, grad.double())
    out = sinkhorn(logits, steps)
    assert out.dtype == dtype
    tolerance = narrow(logits)
    for got in (out, sinkhorn_reference(logits, steps)):
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
    by_hand = sinkhorn_backward_reference(grad, logits.detach(), steps)
    for got in (*torch.autograd.grad(out, logits, grad), by_hand):
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("M", [2, 4, 7])
def test_rows_and_columns_sum_to_one(M: int) -> None:
    """Rows are divided last; how near 20 steps bring columns of such logits, `test_hyper_connections.py` derives."""
    mixed = sinkhorn(2 * torch.rand(500, M, M, dtype=torch.float64) - 1, STEPS)
    ones = torch.ones(500, M, dtype=torch.float64)
    torch.testing.assert_close(mixed.sum(-1), ones, rtol=0, atol=1e-14)
    torch.testing.assert_close(mixed.sum(-2), ones, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [200.0, 1e4])
def test_extreme_logits_give_numbers_and_rows_that_sum_to_one(size: float, dtype: torch.dtype) -> None:
    """Also where a whole row is so far below the others that its exponentials vanish."""
    low_row = torch.zeros(3, 3).index_fill_(0, torch.tensor([1]), -size) + torch.randn(3, 3)
    logits = torch.stack([size * torch.randn(3, 3), size * torch.eye(3), low_row, low_row.T, -low_row]).to(dtype)
    out, grad = sinkhorn(logits.requires_grad_(), STEPS), torch.randn(5, 3, 3, dtype=dtype)
    (gradient,) = torch.autograd.grad(out, logits, grad)
    torch.testing.assert_close(out.sum(-1), torch.ones(5, 3, dtype=dtype))
    torch.testing.assert_close(out, in_logarithms(logits, STEPS), rtol=1e-3, atol=1e-3)
    by_hand = sinkhorn_backward_reference(grad, logits.detach(), STEPS)
    assert all(x.isfinite().all() for x in (out, gradient, by_hand, sinkhorn_reference(logits, STEPS)))


def test_a_broken_logit_breaks_its_token_and_no_other() -> None:
    logits = torch.randn(20, 4, 4)
    logits[3, 1, 2] = float("nan")
    whole = sinkhorn(logits, STEPS).isfinite().flatten(1).all(1)
    assert whole.tolist() == [n != 3 for n in range(20)]


@pytest.mark.parametrize(
    ("stream", "other"),
    [(torch.float64,) * 2, (torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2],
)
@pytest.mark.parametrize(("shape", "M", "D"), [((2, 5), 4, 33), ((7,), 3, 16), ((1,), 2, 1)])
def test_branches_are_read_and_written_as_the_equations_say(
    shape: tuple[int, ...], M: int, D: int, stream: torch.dtype, other: torch.dtype
) -> None:
    hidden, update = torch.randn(*shape, M, D).to(stream), torch.randn(*shape, D).to(other)
    wide = torch.promote_types(stream, torch.float32)
    weights, post, res = (torch.rand(*shape, *axes, dtype=wide) for axes in ((M,), (M,), (M, M)))
    read_grad, write_grad = torch.randn(*shape, D).to(stream), torch.randn(*shape, M, D).to(stream)
    for kernel, reference, backward, equation, inputs, grad in (
        (
            read_branches,
            read_branches_reference,
            read_branches_backward_reference,
            lambda h, w: torch.einsum("...m,...md->...d", w, h),
            (hidden, weights),
            read_grad,
        ),
        (
            write_branches,
            write_branches_reference,
            write_branches_backward_reference,
            lambda h, u, p, r: torch.einsum("...mn,...nd->...md", r, h) + torch.einsum("...m,...d->...md", p, u),
            (hidden, update, post, res),
            write_grad,
        ),
    ):
        inputs = [x.detach().requires_grad_() for x in inputs]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        expected = equation(*exact)
        wanted = torch.autograd.grad(expected, exact, grad.double())
        out = kernel(*inputs)
        assert out.dtype == stream
        tolerance = narrow(*inputs)
        for got in (out, reference(*inputs)):
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        by_hand = backward(grad, *(x.detach() for x in inputs))
        for grads in (torch.autograd.grad(out, inputs, grad), by_hand):
            for x, got, want in zip(inputs, grads, wanted, strict=True):
                assert got.dtype == x.dtype
                torch.testing.assert_close(got.double(), want, rtol=4 * tolerance, atol=10 * tolerance)


def test_gradients_are_those_of_finite_differences() -> None:
    M, D = 3, 2
    logits, hidden, update, weights = (
        torch.randn(2, *axes, dtype=torch.float64, requires_grad=True) for axes in ((M, M), (M, D), (D,), (M,))
    )
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, STEPS), logits)
    assert torch.autograd.gradcheck(read_branches, (hidden, weights))
    assert torch.autograd.gradcheck(write_branches, (hidden, update, weights, logits))


def test_a_stream_of_equal_branches_need_not_be_laid_out() -> None:
    """As the embedding hands it on: one branch, seen M times."""
    stream = torch.randn(2, 5, 1, 6)
    shown, update = stream.expand(-1, -1, 4, -1), torch.randn(2, 6, 5).transpose(1, 2)
    weights, res = torch.rand(2, 5, 4), torch.rand(2, 5, 4, 4).transpose(2, 3)
    copied = shown.contiguous(), update.contiguous(), weights, res.contiguous()
    assert torch.equal(read_branches(shown, weights), read_branches(copied[0], weights))
    assert torch.equal(write_branches(shown, update, weights, res), write_branches(*copied))


def test_the_operators_keep_their_promises_to_the_compiler() -> None:
    hidden, update, weights, logits = (
        torch.randn(2, 3, *axes, requires_grad=True) for axes in ((4, 6), (6,), (4,), (4, 4))
    )
    torch.library.opcheck(torch.ops.engram.sinkhorn.default, (logits, STEPS))
    torch.library.opcheck(torch.ops.engram.read_branches.default, (hidden, weights))
    torch.library.opcheck(torch.ops.engram.write_branches.default, (hidden, update, weights, logits))
    torch.library.opcheck(torch.ops.engram.write_branches.default, (hidden, update.bfloat16(), weights, logits))


def test_shapes_and_steps_that_do_not_fit_are_refused_by_name() -> None:
    hidden, update, weights, res = (torch.ones(2, 3, *axes) for axes in ((4, 6), (6,), (4,), (4, 4)))
    with pytest.raises(ValueError, match="steps is 0: allowed is 1 or more"):
        sinkhorn(res, 0)
    for logits in (torch.ones(3, 4, 2), torch.ones(3, 0, 0)):
        with pytest.raises(ValueError, match="shape of logits is"):
            sinkhorn(logits)
    with pytest.raises(ValueError, match="shape of weights is"):
        read_branches(hidden, weights[:1])
    for name, arguments in (
        ("update", (update[:1], weights, res)),
        ("post", (update, weights[..., :3], res)),
        ("res", (update, weights, res[..., :3])),
    ):
        with pytest.raises(ValueError, match=f"shape of {name} is"):
            write_branches(hidden, *arguments)


def test_no_branches_are_read_as_zeros() -> None:
    assert torch.equal(read_branches(torch.ones(3, 0, 4), torch.ones(3, 0)), torch.zeros(3, 4))
