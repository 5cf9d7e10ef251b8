"""RMSNorm, with and without rotary positions, and cross-entropy in Triton against their references."""

from __future__ import annotations

import pytest
import torch

from engram.kernels.loss import cross_entropy_reference_
from engram.kernels.norm import (
    norm_rotate_backward_reference,
    norm_rotate_reference,
    rms_norm_backward_reference,
    rms_norm_reference,
)
from engram.kernels.triton.loss import cross_entropy_triton_
from engram.kernels.triton.norm import rms_norm_backward_triton, rms_norm_triton
from engram.kernels.triton.rotate import norm_rotate_backward_triton, norm_rotate_triton

EXACT = {"rtol": 1e-4, "atol": 2e-5}
ROUNDED = {"rtol": 2**-7, "atol": 2e-2}
TYPES = [
    (torch.float16, torch.float32),
    (torch.float32,) * 2,
    (torch.bfloat16, torch.float32),
    (torch.bfloat16,) * 2,
    (torch.float64,) * 2,
]


def assert_same(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], dtype: torch.dtype) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert x.is_contiguous()
        torch.testing.assert_close(x, y, **(ROUNDED if dtype.itemsize == 2 else EXACT))


@pytest.mark.parametrize("shape", [(2, 9, 64), (40, 300), (9, 80), (3, 5000), (1, 1), (0, 16), (7, 2, 3, 33)])
@pytest.mark.parametrize(("dtype", "weights"), TYPES)
def test_norms_follow_their_references(
    shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype, device: torch.device
) -> None:
    x, grad = (torch.randn(shape).to(device, dtype) for _ in range(2))
    w = torch.randn(shape[-1]).to(device, weights)
    ours, theirs = rms_norm_triton(x, w, 1e-2), rms_norm_reference(x, w, 1e-2)
    assert_same(ours, theirs, dtype)
    back = grad, x, w, theirs[1]
    assert_same(rms_norm_backward_triton(*back), rms_norm_backward_reference(*back), dtype)


@pytest.mark.parametrize(
    "view", [(slice(None),) * 2 + (slice(5, 53),), (slice(None, None, 2),), (slice(1), slice(2, 3))]
)
def test_norms_take_views(view: tuple[slice, ...], device: torch.device) -> None:
    for whole in (torch.randn(4, 6, 64), torch.randn(6, 4, 64).transpose(0, 1), torch.randn(4, 64, 6).mT):
        x, grad = whole.to(device)[view], whole.cos().to(device)[view]
        w = torch.randn(x.shape[-1]).to(device)
        ours, theirs = rms_norm_triton(x, w, 1e-2), rms_norm_reference(x, w, 1e-2)
        assert_same(ours, theirs, x.dtype)
        back = grad, x, w, theirs[1]
        assert_same(rms_norm_backward_triton(*back), rms_norm_backward_reference(*back), x.dtype)


@pytest.mark.parametrize("shape", [(1, 9, 3, 32), (3, 5, 4, 128), (2, 70, 1, 6), (2, 3, 5, 48), (2, 0, 3, 8)])
@pytest.mark.parametrize(("dtype", "weights"), [*TYPES, (torch.bfloat16, None), (torch.float64, None)])
def test_turned_heads_follow_their_references(
    shape: tuple[int, ...], dtype: torch.dtype, weights: torch.dtype | None, device: torch.device
) -> None:
    B, T, h, c = shape
    angles = torch.rand(T, c // 2).to(device, torch.promote_types(dtype, torch.float32))
    w = None if weights is None else torch.randn(c).to(device, weights)
    # Beside others as in the product that made them, and with heads and tokens exchanged as attention may leave them.
    x = torch.randn(B, T, h + 2, c).to(device, dtype)[:, :, 1:-1]
    grad = torch.randn(B, h, T, c).to(device, dtype).transpose(1, 2)
    arguments = x, w, angles.cos(), angles.sin()
    ours, theirs = norm_rotate_triton(*arguments, 1e-2), norm_rotate_reference(*arguments, 1e-2)
    assert_same(ours, theirs, dtype)
    back = grad, *arguments, theirs[1]
    assert_same(norm_rotate_backward_triton(*back), norm_rotate_backward_reference(*back), dtype)


def test_heads_that_are_not_dense_are_turned(device: torch.device) -> None:
    x, angles = torch.randn(2, 3, 8, 5).to(device).mT, torch.rand(3, 4).to(device)
    arguments = x, None, angles.cos(), angles.sin()
    assert_same(norm_rotate_triton(*arguments, 0.0), norm_rotate_reference(*arguments, 0.0), x.dtype)
    back = x.cos(), *arguments, x.new_empty(0)
    assert_same(norm_rotate_backward_triton(*back), norm_rotate_backward_reference(*back), x.dtype)


@pytest.mark.parametrize(("N", "V"), [(5, 300), (2, 2048), (2, 20001), (1, 32768), (3, 1), (0, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_cross_entropy_follows_its_reference(
    N: int, V: int, dtype: torch.dtype, spread: float, device: torch.device
) -> None:
    buffer = (spread * torch.randn(N, V + 8)).to(device, dtype)
    ours, theirs = buffer[:, :V], buffer[:, :V].clone()
    beside, targets = buffer[:, V:].clone(), torch.randint(V, (N,)).to(device)
    losses, expected = cross_entropy_triton_(ours, targets), cross_entropy_reference_(theirs, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    rounding = 2**-7 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(ours, theirs, rtol=rounding, atol=1e-6 * spread)  # float32 holds 300 to about 1e-5
    assert buffer[:, V:].equal(beside)


def test_logits_in_columns_are_turned_into_their_gradient(device: torch.device) -> None:
    logits, targets = torch.randn(30, 4).to(device).T, torch.arange(4).to(device)
    expected = logits.clone()
    torch.testing.assert_close(cross_entropy_triton_(logits, targets), cross_entropy_reference_(expected, targets))
    torch.testing.assert_close(logits, expected)


def test_logits_of_minus_infinity_have_no_share(device: torch.device) -> None:
    logits, targets = torch.randn(3, 2000).to(device), torch.tensor([5, 1500, 1999]).to(device)
    logits[:, 6:1500] = -torch.inf
    expected = logits.clone()
    torch.testing.assert_close(cross_entropy_triton_(logits, targets), cross_entropy_reference_(expected, targets))
    torch.testing.assert_close(logits, expected, **EXACT)
    assert not logits[:, 6:1500].any()


def test_gradients_of_weights_are_the_same_to_the_bit_each_time(device: torch.device) -> None:
    x, grad, w = torch.randn(500, 64).to(device), torch.randn(500, 64).to(device), torch.ones(64).to(device)
    back = grad, x, w, rms_norm_triton(x, w, 1e-6)[1]
    heads = grad.view(1, 50, 10, 64), x.view(1, 50, 10, 64), w, *torch.rand(2, 50, 32).to(device), back[3]
    for call, arguments in ((rms_norm_backward_triton, back), (norm_rotate_backward_triton, heads)):
        first = call(*arguments)[1]
        assert all(call(*arguments)[1].equal(first) for _ in range(3))
