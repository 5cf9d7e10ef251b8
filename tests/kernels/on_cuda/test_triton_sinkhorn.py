"""Hyper-connections' operators in Triton against their references."""

from __future__ import annotations

import pytest
import torch

from engram.kernels.sinkhorn import (
    read_branches_backward_reference,
    read_branches_reference,
    sinkhorn_backward_reference,
    sinkhorn_reference,
    write_branches_backward_reference,
    write_branches_reference,
)
from engram.kernels.triton.sinkhorn import (
    read_branches_backward_triton,
    read_branches_triton,
    sinkhorn_backward_triton,
    sinkhorn_triton,
    write_branches_backward_triton,
    write_branches_triton,
)

EXACT = {"rtol": 1e-4, "atol": 1e-5}
ROUNDED = {"rtol": 2**-7, "atol": 2e-2}


@pytest.mark.parametrize(("N", "M", "steps"), [(3, 4, 20), (40, 3, 20), (5, 1, 2), (2, 7, 1), (0, 4, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_follow_their_reference(N: int, M: int, steps: int, dtype: torch.dtype, device: torch.device) -> None:
    logits, grad = (3 * torch.randn(N, M, M).to(device, dtype) for _ in range(2))
    tolerance = ROUNDED if dtype == torch.bfloat16 else EXACT
    torch.testing.assert_close(sinkhorn_triton(logits, steps), sinkhorn_reference(logits, steps), **tolerance)
    ours, theirs = (f(grad, logits, steps) for f in (sinkhorn_backward_triton, sinkhorn_backward_reference))
    torch.testing.assert_close(ours, theirs, **tolerance)


def test_extreme_logits_give_numbers(device: torch.device) -> None:
    logits = torch.stack([1e4 * torch.randn(3, 3), torch.diag(torch.tensor([0.0, -1e4, 1e4]))]).to(device)
    torch.testing.assert_close(sinkhorn_triton(logits, 20), sinkhorn_reference(logits, 20), **EXACT)
    assert sinkhorn_backward_triton(logits.sin(), logits, 20).isfinite().all()


@pytest.mark.parametrize(("N", "M", "D"), [(3, 4, 200), (9, 3, 16), (2, 2, 1), (0, 4, 16)])
@pytest.mark.parametrize(
    ("stream", "other"),
    [(torch.float32,) * 2, (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2, (torch.float64,) * 2],
)
def test_reading_and_writing_follow_their_references(
    N: int, M: int, D: int, stream: torch.dtype, other: torch.dtype, device: torch.device
) -> None:
    hidden, update = torch.randn(N, M, D).to(device, stream), torch.randn(N, D).to(device, other)
    wide = torch.promote_types(stream, torch.float32)
    weights, res = torch.rand(N, M).to(device, wide), torch.rand(N, M, M).to(device, wide)
    read_grad, write_grad = torch.randn(N, D).to(device, stream), torch.randn(N, M, D).to(device, stream)
    written = hidden, update, weights, res
    ours = (
        read_branches_triton(hidden, weights),
        write_branches_triton(*written),
        *read_branches_backward_triton(read_grad, hidden, weights),
        *write_branches_backward_triton(write_grad, *written),
    )
    theirs = (
        read_branches_reference(hidden, weights),
        write_branches_reference(*written),
        *read_branches_backward_reference(read_grad, hidden, weights),
        *write_branches_backward_reference(write_grad, *written),
    )
    for x, y in zip(ours, theirs, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, **(ROUNDED if torch.bfloat16 in (stream, other) else EXACT))
