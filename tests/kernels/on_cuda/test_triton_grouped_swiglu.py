"""`grouped_swiglu` and its backward, by grouped products with Triton between them, against their references."""

from __future__ import annotations

import pytest
import torch

from engram.kernels.grouped_swiglu import grouped_swiglu_backward_reference, grouped_swiglu_reference
from engram.kernels.layout import lay_out_reference
from engram.kernels.triton.grouped_swiglu import grouped_swiglu_backward_triton, grouped_swiglu_triton


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("N", [0, 61])
def test_kernels_follow_their_references(N: int, wide: torch.dtype, idle: bool, device: torch.device) -> None:
    E, K, D, F = 7, 3, 48, 24
    experts = torch.rand(N, E).topk(K).indices
    experts = (torch.tensor([1, 4, 6]).expand(N, K) if idle else experts).to(device)
    place, copy, ends = lay_out_reference(experts, torch.bincount(experts.flatten(), minlength=E), 1, True)
    x, grad = (torch.randn(N, D).to(device, torch.bfloat16) for _ in range(2))
    weights = torch.rand(N, K, device=device)
    w_gate_up, w_down = torch.randn(E, D, 2 * F).to(device, wide) / 4, torch.randn(E, F, D).to(device, wide) / 4
    arguments = (x, weights, place, copy, ends, w_gate_up, w_down)
    ours, theirs = grouped_swiglu_triton(*arguments), grouped_swiglu_reference(*arguments)
    pairs = list(zip(ours, theirs, strict=True))
    pairs += zip(
        grouped_swiglu_backward_triton(grad, *arguments, theirs[1]),
        grouped_swiglu_backward_reference(grad, *arguments, theirs[1]),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert (one.double() - other.double()).norm() <= 1.5e-2 * other.double().norm()
