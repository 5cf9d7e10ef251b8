"""Hashing in Triton, alone and with the rows read in the same pass, against the reference."""

from __future__ import annotations

import pytest
import torch

from engram.kernels.hashing import hash_ngrams_reference
from engram.kernels.triton.gather import hash_gather_reference
from engram.kernels.triton.hashing import hash_gather_triton, hash_ngrams_triton

PRIMES = [1_000_003, 2_147_483_647, 4_294_967_311, 9_007_199_254_740_997]  # the last beyond a double's 53 bits


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("eos_id", [-1, 1, 3])
@pytest.mark.parametrize("orders", [[2, 3], [1, 2, 3, 4], [3]])
@pytest.mark.parametrize(("T", "past"), [(12, 0), (8, 4), (1, 2), (75, 3)])  # up to 64 tokens to a program
def test_rows_are_the_references(
    packed: bool, eos_id: int, orders: list[int], T: int, past: int, device: torch.device
) -> None:
    ids = torch.randint(0, 6, (3, past + T), device=device)
    documents = torch.randint(0, 2, ids.shape, device=device).cumsum(1) - 1 if packed else None
    H = 2 * len(orders)
    moduli = torch.tensor([[PRIMES[(h + layer) % 4] for h in range(H)] for layer in range(2)], device=device)
    offsets = torch.arange(2 * H, device=device).view(2, H) * 10**12
    multipliers = torch.randint(1, 2**60, (orders[-1],)).tolist()
    arguments = (ids, documents, moduli, offsets, 1, multipliers, orders, past, 2, eos_id, 6)
    assert torch.equal(hash_ngrams_triton(*arguments), hash_ngrams_reference(*arguments))


@pytest.mark.parametrize("width", [1, 24, 130, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_gathered_is_what_the_rows_hold(width: int, dtype: torch.dtype, device: torch.device) -> None:
    ids = torch.randint(0, 2**31, (2, 9), device=device)
    moduli, offsets = torch.tensor([[7, 11, 13, 5, 3, 17]], device=device), torch.arange(6, device=device)[None] * 20
    table = torch.randn(120, width, device=device).to(dtype)
    arguments = (ids, None, moduli, offsets, 0, [3, 2**31 + 11, 12345], [2, 3], 0, 2, -1, 2**31, table)
    for ours, theirs in zip(hash_gather_triton(*arguments), hash_gather_reference(*arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    ids, moduli, offsets = torch.randint(0, 9, (2, 5)), torch.tensor([[7, 11]]), torch.tensor([[0, 7]])
    arguments = (ids, None, moduli, offsets, 0, [3, 5], [1, 2], 1, 2, -1, 9, torch.randn(18, 4))
    torch.library.opcheck(torch.ops.engram.hash_gather.default, arguments)
