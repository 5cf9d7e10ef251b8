"""A memory table in the 8 bits in which DeepSeek-V4.1 stores it: a row's values and its scales side by side, 264 bytes
for 256 values. It is only read: to train rows, read them as bfloat16 or float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engram.interop.block_scales import BLOCK
from engram.memory import MemoryTable


class BlockScaledTable(MemoryTable):
    """Rows of E4M3 values with an E8M0 scale for each 32, in the place of a `MemoryTable`. It has no parameters.

    Args:
        records: `[R, width + width / 32]`, uint8: values, then scales.
        dtype: type of the values that are read.
    """

    records: Tensor

    def __init__(self, records: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        nn.Module.__init__(self)
        self.width = records.shape[1] * BLOCK // (BLOCK + 1)
        self.dtype = dtype
        self.register_buffer("records", records)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows `[..., H]` (int64 indices) -> their values `[..., H, width]`."""
        records = self.records[rows]
        values = records[..., : self.width].contiguous().view(torch.float8_e4m3fn).float()
        scales = records[..., self.width :].contiguous().view(torch.float8_e8m0fnu).float()
        return (values.unflatten(-1, (-1, BLOCK)) * scales.unsqueeze(-1)).flatten(-2).to(self.dtype)

    def extra_repr(self) -> str:
        return f"n_rows={len(self.records)}, width={self.width}, dtype={self.dtype}, rows=E4M3 with E8M0 scales"

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockScaledTable:
        nn.Module._apply(self, fn, recurse)  # a change of type leaves whole numbers
        return self

    def _enter(self) -> None:
        """No backward pass looks for it."""
