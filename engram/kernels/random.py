"""Random numbers that depend on a seed, a row and a column alone.

So a process that holds some rows of a table draws for them what any other would, and rounding at random is the same
wherever it is done.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_CPU = 2**18  # numbers at a time: what is computed with them should stay in cache
_CHUNK = 2**24  # a GPU wants few and large operations


def _int32(value: int) -> int:
    """The low 32 bits, as a signed number."""
    return (value + 2**31) % 2**32 - 2**31


def scramble(x: Tensor) -> Tensor:
    """A bijection of int32 whose output bits each depend on all input bits."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * _int32(0x846CA68B)
    return x ^ ((x >> 16) & 0xFFFF)


def random_bits(rows: Tensor, width: int, seed: int, step: int) -> Tensor:
    """32 random bits, int32, for each of `width` columns of rows `[n]` (int64), `[n, width]`."""
    key = torch.tensor([_int32(seed), _int32(step)], dtype=torch.int32, device=rows.device)
    key = scramble(key[:1] ^ scramble(key[1:]))
    by_row = scramble(rows.to(torch.int32) ^ key) ^ (rows >> 32).to(torch.int32)
    column = (torch.arange(width, device=rows.device) * 0x9E3779B9).to(torch.int32)
    return scramble(by_row.unsqueeze(1) + column)


@torch.no_grad()
def fill_normal_(table: Tensor, std: float, seed: int, first: int = 0, stride: int = 1) -> None:
    """N(0, std^2) for a table `[R, W]` whose row i is row `first + i * stride` of a larger one.

    The normal distribution is inverted at multiples of 2^-24, so none is farther than 5.5 std from 0.
    """
    width = table.shape[1]
    per_chunk = max((_CHUNK_CPU if table.device.type == "cpu" else _CHUNK) // width, 1)
    for start in range(0, len(table), per_chunk):
        part = table[start : start + per_chunk]
        rows = first + stride * torch.arange(start, start + len(part), device=table.device)
        uniform = (random_bits(rows, width, seed, 0) >> 8).float().add_(0.5).mul_(2.0**-23)  # -1 to 1
        part.copy_(uniform.erfinv_().mul_(std * 2**0.5))
