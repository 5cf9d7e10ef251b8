"""Rows picked from a cache or a table, in Triton, against the reference."""

from __future__ import annotations

import pytest
import torch

from engram.kernels.elsewhere import pick_rows_reference
from engram.kernels.triton.elsewhere import pick_rows_triton


@pytest.mark.parametrize(
    ("n", "row_bytes", "n_cached"), [(1100, 64, 9), (33, 36, 1), (5, 7, 3), (40, 1300, 4), (0, 8, 2)]
)
def test_rows_come_from_the_cache_where_it_has_them(
    n: int, row_bytes: int, n_cached: int, device: torch.device
) -> None:
    table = torch.randint(0, 255, (50, row_bytes), dtype=torch.uint8, device=device)
    cache = torch.randint(0, 255, (n_cached, row_bytes), dtype=torch.uint8, device=device)
    rows, slots = (torch.randint(low, high, (n,), device=device) for low, high in ((0, 50), (-1, n_cached)))
    arguments = (cache, slots, table, rows)
    assert torch.equal(pick_rows_triton(*arguments), pick_rows_reference(*arguments))


def test_rows_come_from_the_hosts_memory(device: torch.device) -> None:
    table = torch.randint(0, 255, (50, 64), dtype=torch.uint8)
    cache, rows, slots = table[:4].to(device), torch.randint(0, 50, (1100,)), torch.randint(-1, 4, (1100,))
    if device.type == "cuda":
        table = table.pin_memory()
    picked = pick_rows_triton(cache, slots.to(device), table, rows.to(device))
    assert torch.equal(picked.cpu(), pick_rows_reference(cache.cpu(), slots, table, rows))
