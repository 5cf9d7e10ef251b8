"""The weighted SwiGLU against torch's own operations, in every type, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from engram.kernels import load_native, swiglu
from engram.kernels.swiglu import swiglu_backward_reference, swiglu_reference


@pytest.mark.parametrize("native", [True, False])
def test_gradients_are_those_of_finite_differences(native: bool) -> None:
    load_native()
    gate_up = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    if native:
        assert torch.autograd.gradcheck(swiglu, (gate_up, weights))
        return
    grad = torch.randn(5, 3, dtype=torch.float64)
    expected = torch.autograd.grad(swiglu_reference(gate_up, weights), (gate_up, weights), grad)
    ours = swiglu_backward_reference(grad, gate_up.detach(), weights.detach())
    for x, y in zip(ours, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("P", "width"), [(1, 1), (7, 33), (300, 64)])
def test_values_and_gradients_are_those_of_torch(dtype: torch.dtype, P: int, width: int) -> None:
    load_native()
    gate_up = (4 * torch.randn(P, 2 * width)).to(dtype).requires_grad_()
    weights = torch.rand(P).to(dtype).requires_grad_()
    wide, wide_weights = (x.detach().double().requires_grad_() for x in (gate_up, weights))
    gate, up = wide.chunk(2, dim=-1)
    expected = F.silu(gate) * up * wide_weights.unsqueeze(1)
    out = swiglu(gate_up, weights)
    assert out.dtype == dtype
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 3e-6, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(P, width).to(dtype)
    ours = torch.autograd.grad(out, (gate_up, weights), grad)
    theirs = torch.autograd.grad(expected, (wide, wide_weights), grad.double())
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=4 * tolerance, atol=4 * tolerance * float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_weights_any_leading_axes_do(dtype: torch.dtype) -> None:
    load_native()
    gate_up, grad = torch.randn(2, 3, 5, 8).to(dtype).requires_grad_(), torch.randn(2, 3, 5, 4).to(dtype)
    ones = torch.ones(30, dtype=dtype)
    out, expected = swiglu(gate_up), swiglu(gate_up.flatten(0, 2), ones).view(2, 3, 5, 4)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(y, gate_up, grad)[0] for y in (out, expected)))
    torch.testing.assert_close(out, swiglu_reference(gate_up, None))
    (wanted,) = torch.autograd.grad(swiglu_reference(gate_up, None), gate_up, grad)
    torch.testing.assert_close(swiglu_backward_reference(grad, gate_up.detach(), None)[0], wanted)


@pytest.mark.parametrize("gate", [-1e4, -90.0, 90.0, 1e4])
def test_large_gates_neither_overflow_nor_lose_their_sign(gate: float) -> None:
    load_native()
    x = torch.tensor([[gate, 2.0]], requires_grad=True)
    out = swiglu(x, torch.ones(1))
    out.backward()
    torch.testing.assert_close(out, torch.tensor([[2.0 * max(gate, 0.0)]]))
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0, 1].item(), max(gate, 0.0))


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    arguments = (torch.randn(4, 6, requires_grad=True), torch.rand(4, requires_grad=True))
    torch.library.opcheck(torch.ops.engram.swiglu.default, arguments)


def test_rows_of_nothing_give_their_weights_no_gradient() -> None:
    load_native()
    weights = torch.ones(8, requires_grad=True)
    for spoilt in [torch.full((8,), 5.0) for _ in range(9)]:
        del spoilt  # memory that is likely used again
    swiglu(torch.zeros(8, 0, requires_grad=True), weights).sum().backward()
    assert torch.equal(weights.grad, torch.zeros(8))  # type: ignore[arg-type]


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    load_native()
    with pytest.raises(ValueError, match=r"gate_up is \[2, 5\]: allowed is \[..., 2F\]"):
        swiglu(torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"weights is \[1\]: allowed is \[4\]"):
        swiglu(torch.ones(4, 6), torch.ones(1))
