"""Chunked cross-entropy against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F

from engram.backbone import mean_loss, token_losses


@pytest.mark.parametrize("T", [3, 300])  # one chunk, and several with a rest
def test_losses_and_gradients_are_those_of_torch(T: int) -> None:
    hidden = torch.randn(4, T, 10, dtype=torch.float64, requires_grad=True)
    head = torch.randn(50, 10, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 50, (4, T))
    expected = F.cross_entropy((hidden @ head.T).flatten(0, 1), targets.flatten(), reduction="none").view(4, T)
    torch.testing.assert_close(token_losses(hidden, head, targets), expected.detach())
    loss = mean_loss(hidden, head, targets)
    torch.testing.assert_close(loss, expected.mean())
    grads = torch.autograd.grad(3 * loss, (hidden, head))
    expected_grads = torch.autograd.grad(3 * expected.mean(), (hidden, head))
    for got, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, wanted)


def test_autocast_stays_close_to_float32() -> None:
    hidden, head, targets = torch.randn(2, 300, 64), torch.randn(200, 64) * 0.1, torch.randint(0, 200, (2, 300))
    with torch.autocast("cpu", torch.bfloat16):
        low, low_mean = token_losses(hidden, head, targets), mean_loss(hidden, head, targets)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, token_losses(hidden, head, targets), rtol=0.02, atol=0.02)
    torch.testing.assert_close(low_mean, low.mean())


def test_no_tokens_have_the_mean_that_torch_gives_them() -> None:
    assert mean_loss(torch.randn(1, 0, 4), torch.randn(9, 4), torch.zeros(1, 0, dtype=torch.int64)).isnan()
