"""8-bit floats with a power of two for each block of 32 values: tables and projections of the released DeepSeek-V4.1.

Values are E4M3, scales E8M0 (OCP Microscaling Formats, version 1.0). A table's blocks lie in one row, a projection's
are 32 x 32. What the two make is a bfloat16 number, but where it is below 2**-133 or above all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32
_LARGEST = 448.0  # of E4M3
_BIAS = 127  # of E8M0: the byte b stands for 2**(b - 127)


def decode(values: Tensor, scales: Tensor, block_rows: int) -> Tensor:
    """Values `[R, C]` (E4M3) times scales `[ceil(R / block_rows), ceil(C / 32)]` (E8M0), in float32."""
    return values.float() * _spread(scales.float(), values, block_rows)


def encode(new: Tensor, values: Tensor, scales: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """Values and scales for `new` `[R, C]` in the place of those given, which blocks that have not changed keep.

    A changed block's scale is the smallest power of two that brings its largest value within E4M3. Infinity, which
    E4M3 lacks, becomes NaN.
    """
    before = decode(values, scales, block_rows).to(new.dtype)  # read as this type, so compared in it
    grid = (-(-new.shape[0] // block_rows), -(-new.shape[1] // BLOCK))
    changed = _blocks(_bits(new) != _bits(before), grid, block_rows).any(-1)
    finite = new.isfinite()
    largest = _blocks(torch.where(finite, new.float().abs(), 0), grid, block_rows).amax(-1)
    fraction, exponent = torch.frexp(largest / _LARGEST)
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)  # frexp's fractions lie in [0.5, 1)
    exponent = torch.where(largest == 0, 0, exponent).clamp(1 - _BIAS, _BIAS)
    fresh = (exponent + _BIAS).to(torch.uint8)
    kept = torch.where(changed, fresh, scales.view(torch.uint8)).view(torch.float8_e8m0fnu)
    rounded = (new.float() / _spread(kept.float(), new, block_rows)).clamp(-_LARGEST, _LARGEST)
    rounded = torch.where(finite, rounded, torch.nan)
    moved = _spread(changed, new, block_rows)
    bytes_ = torch.where(moved, rounded.to(torch.float8_e4m3fn).view(torch.uint8), values.view(torch.uint8))
    return bytes_.view(torch.float8_e4m3fn), kept


def _bits(x: Tensor) -> Tensor:
    """As integers, in which 0 and -0, and a NaN and itself, compare as they should."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def _spread(scales: Tensor, like: Tensor, block_rows: int) -> Tensor:
    """A number for each block `->` one for each value."""
    R, C = like.shape
    return scales.repeat_interleave(block_rows, 0)[:R].repeat_interleave(BLOCK, 1)[:, :C]


def _blocks(x: Tensor, grid: tuple[int, int], block_rows: int) -> Tensor:
    """`[R, C]` -> `[rows of blocks, columns of blocks, values of a block]`, filled up with 0."""
    R, C = x.shape
    x = torch.nn.functional.pad(x, (0, grid[1] * BLOCK - C, 0, grid[0] * block_rows - R))
    return x.view(grid[0], block_rows, grid[1], BLOCK).transpose(1, 2).flatten(2)
