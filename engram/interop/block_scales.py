"""Matrices in 8-bit floats with a scale for each block, decoded and encoded: those of the released DeepSeek-V4.1.

A table's blocks are 32 values of one row, a projection's are 32 x 32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.memory.microscaling import BLOCK, from_codes, smallest_scales, to_codes


def decode(values: Tensor, scales: Tensor, block_rows: int) -> Tensor:
    """Values `[R, C]` (E4M3) times scales `[ceil(R / block_rows), ceil(C / 32)]` (E8M0), in float32."""
    return _matrix(from_codes(_blocks(values.float(), block_rows), scales), values.shape, block_rows)


def encode(new: Tensor, values: Tensor, scales: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """Values and scales for `new` `[R, C]` in the place of those given, which blocks that have not changed keep.

    A changed block's scale is the smallest that holds it. Infinity, which E4M3 lacks, becomes NaN.
    """
    before = decode(values, scales, block_rows).to(new.dtype)  # read as this type, so compared in it
    changed = _blocks(_bits(new) != _bits(before), block_rows).any(-1)
    x = _blocks(new, block_rows)[changed].float()
    finite = x.isfinite()
    fresh = smallest_scales(torch.where(finite, x, 0))
    codes, kept = _blocks(values.view(torch.uint8), block_rows).clone(), scales.view(torch.uint8).clone()
    codes[changed] = to_codes(torch.where(finite, x, torch.nan), fresh).view(torch.uint8)
    kept[changed] = fresh.view(torch.uint8)
    return _matrix(codes, new.shape, block_rows).view(torch.float8_e4m3fn), kept.view(torch.float8_e8m0fnu)


def _bits(x: Tensor) -> Tensor:
    """As integers, in which 0 and -0, and a NaN and itself, compare as they should."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.dtype.itemsize])


def _blocks(x: Tensor, block_rows: int) -> Tensor:
    """`[R, C]` -> `[rows of blocks, columns of blocks, values of a block]`, filled up with 0."""
    R, C = x.shape
    x = torch.nn.functional.pad(x, (0, -C % BLOCK, 0, -R % block_rows))
    return x.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, block_rows)).transpose(1, 2).flatten(2)


def _matrix(blocks: Tensor, shape: torch.Size, block_rows: int) -> Tensor:
    """`_blocks` undone, `[R, C]` of a shape."""
    x = blocks.unflatten(2, (block_rows, BLOCK)).transpose(1, 2).flatten(2).flatten(0, 1)
    return x[: shape[0], : shape[1]].contiguous()
