"""`swiglu` and its backward in Triton against their references."""

from __future__ import annotations

import pytest
import torch

from engram.kernels.swiglu import swiglu_backward_reference, swiglu_reference
from engram.kernels.triton.swiglu import swiglu_backward_triton, swiglu_triton


@pytest.mark.parametrize(("P", "F"), [(5, 48), (17, 300), (1, 1), (0, 16)])
@pytest.mark.parametrize(
    ("dtype", "weights"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16,) * 2,
        (torch.float64,) * 2,
        (torch.bfloat16, None),
    ],
)
def test_kernels_follow_their_references(
    P: int, F: int, dtype: torch.dtype, weights: torch.dtype | None, device: torch.device
) -> None:
    x, g = torch.randn(P, 2 * F).to(device, dtype), torch.randn(P, F).to(device, dtype)
    w = None if weights is None else torch.rand(P).to(device, weights)
    tolerance = {"rtol": 2**-7, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(swiglu_triton(x, w), swiglu_reference(x, w), **tolerance)
    grads = zip(swiglu_backward_triton(g, x, w), swiglu_backward_reference(g, x, w), strict=True)
    for ours, theirs in grads:
        torch.testing.assert_close(ours, theirs, **tolerance)
