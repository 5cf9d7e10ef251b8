"""`route`, `router_logits` and their backwards for CUDA against their references."""

from __future__ import annotations

import pytest
import torch

from engram.kernels.routing import route_backward_reference, route_reference
from engram.kernels.triton.router_logits import router_logits_backward_triton, router_logits_triton
from engram.kernels.triton.routing import route_backward_triton, route_triton


@pytest.mark.parametrize(("N", "E", "k"), [(5, 128, 8), (37, 9, 3), (3, 1025, 5), (1, 1, 1), (0, 8, 2), (4, 6, 6)])
@pytest.mark.parametrize(("sigmoid", "normalize", "scale"), [(True, True, 2.5), (True, False, 1.0), (False, True, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_follow_their_references(
    N: int, E: int, k: int, sigmoid: bool, normalize: bool, scale: float, dtype: torch.dtype, device: torch.device
) -> None:
    logits, bias = 3 * torch.randn(N, E, device=device, dtype=dtype), torch.randn(E, device=device, dtype=dtype) / 9
    weights, experts, load, entropy = route_triton(logits, bias, k, sigmoid, normalize, scale)
    theirs = route_reference(logits, bias, k, sigmoid, normalize, scale)
    by_expert, in_theirs = experts.argsort(), theirs[1].argsort()
    assert torch.equal(experts.gather(1, by_expert), theirs[1].gather(1, in_theirs))
    torch.testing.assert_close(weights.gather(1, by_expert), theirs[0].gather(1, in_theirs), rtol=1e-5, atol=1e-6)
    assert torch.equal(load, theirs[2])
    torch.testing.assert_close(entropy, theirs[3], rtol=1e-5, atol=1e-6, equal_nan=True)
    grad = torch.randn(N, k, device=device, dtype=dtype)
    settings = (sigmoid, normalize, scale)
    torch.testing.assert_close(
        route_backward_triton(grad, logits, experts, *settings),
        route_backward_reference(grad, logits, experts, *settings),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("sigmoid", [True, False])
def test_of_equal_keys_the_lowest_numbers_are_chosen(sigmoid: bool, device: torch.device) -> None:
    logits = torch.zeros(3, 12, device=device)
    logits[1, 7] = 1.0
    bias = torch.zeros(12, device=device)
    bias[10] = 2.0
    _, experts, load, _ = route_triton(logits, bias, 4, sigmoid, True, 1.0)
    assert experts.tolist() == [[10, 0, 1, 2], [10, 7, 0, 1], [10, 0, 1, 2]]
    assert load.tolist() == [3, 3, 2, 0, 0, 0, 0, 1, 0, 0, 3, 0]


def test_keys_below_zero_are_ordered_too(device: torch.device) -> None:
    bias = torch.tensor([-3.0, -1.5, 0.1, -0.2, -9.0], device=device)
    _, experts, _, _ = route_triton(torch.full((2, 5), -30.0, device=device), bias, 4, True, False, 1.0)
    assert experts.tolist() == [[2, 3, 1, 0]] * 2


def test_what_is_not_a_number_still_gets_experts_that_there_are(device: torch.device) -> None:
    """Rows are placed by these numbers."""
    logits = torch.full((2, 6), float("nan"), device=device)
    logits[1, :3] = 0.0
    _, experts, load, _ = route_triton(logits, torch.zeros(6, device=device), 4, True, True, 1.0)
    assert experts.tolist() == [[0, 1, 2, 3], [3, 4, 5, 0]]
    assert load.sum() == 8


def test_scores_of_nothing_give_weights_of_nothing(device: torch.device) -> None:
    logits = torch.full((2, 5), -200.0, device=device)
    weights, experts, _, _ = route_triton(logits, torch.zeros(5, device=device), 2, True, True, 1.0)
    assert weights.count_nonzero() == 0
    grad = route_backward_triton(torch.ones_like(weights), logits, experts, True, True, 1.0)
    assert grad.isfinite().all()


@pytest.mark.parametrize("N", [0, 50])
@pytest.mark.parametrize("tokens", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("router", [torch.bfloat16, torch.float32])
def test_logits_are_exact_and_their_gradients_as_near_as_asked(
    N: int, tokens: torch.dtype, router: torch.dtype, device: torch.device
) -> None:
    x, weight = torch.randn(N, 64).to(device, tokens), torch.randn(12, 64).to(device, router)
    grad = torch.randn(N, 12, device=device, dtype=torch.float64 if tokens == torch.float64 else torch.float32)
    logits = router_logits_triton(x, weight, True)
    assert logits.dtype == grad.dtype
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=1e-5, atol=2e-5)
    wanted = (grad.double() @ weight.double(), grad.double().T @ x.double())
    for bfloat16 in (True, False):
        got = router_logits_backward_triton(grad, x, weight, bfloat16)
        assert [g.dtype for g in got] == [tokens, router]
        for one, other in zip(got, wanted, strict=True):
            rounded = bfloat16 or one.dtype == torch.bfloat16
            assert (one.double() - other).norm() <= (2**-7 if rounded else 1e-5) * other.norm()
