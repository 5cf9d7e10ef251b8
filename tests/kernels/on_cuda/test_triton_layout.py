"""`lay_out_rows` in Triton against its reference, and the moves that go by its places."""

from __future__ import annotations

import pytest
import torch

from engram.kernels.layout import lay_out_reference
from engram.kernels.triton.layout import lay_out_triton
from engram.kernels.triton.spread import spread_triton, sum_rows_triton


@pytest.mark.parametrize(
    ("N", "K", "E", "multiple", "worst"),
    [
        (700, 3, 9, 8, True),  # several segments
        (600, 2, 130, 1, True),
        (40, 4, 5, 1, False),
        (30, 2, 7, 8, False),
        (1, 1, 1, 64, True),
        (0, 2, 4, 8, True),
    ],
)
def test_a_layout_is_that_of_the_reference(
    N: int, K: int, E: int, multiple: int, worst: bool, device: torch.device
) -> None:
    experts = (torch.rand(N, E) ** 2).topk(K).indices.to(device)
    load = torch.bincount(experts.flatten(), minlength=E)
    arguments = (experts, load, multiple, worst)
    for ours, theirs in zip(lay_out_triton(*arguments), lay_out_reference(*arguments), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_many_segments_on_one_expert_stay_in_order(device: torch.device) -> None:
    experts = torch.full((34_000, 1), 1, device=device)
    place, copy, ends = lay_out_triton(experts, torch.tensor([0, 34_000, 0], device=device), 1, True)
    assert torch.equal(place.flatten(), torch.arange(34_000, device=device))
    assert torch.equal(copy, place.flatten())
    assert ends.tolist() == [0, 34_000, 34_000]


@pytest.mark.parametrize(("N", "K", "D"), [(7, 8, 1500), (21, 11, 24), (3, 1, 5), (0, 2, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_copied_and_summed_by_place(N: int, K: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
    place = torch.randperm(N * K).view(N, K).to(device)
    x, rows = torch.randn(N, D).to(device, dtype), torch.randn(N * K, D).to(device, dtype)
    spread = spread_triton(x, place)
    assert torch.equal(spread[place], x[:, None].expand(N, K, D))
    sums = rows[place].double().sum(1)
    torch.testing.assert_close(sum_rows_triton(rows, place).double(), sums.to(dtype).double(), rtol=2**-7, atol=1e-5)
