"""How a row is stored: as a record of bytes, whole numbers or floats of 8 bits with their scales, or as it is.

A record holds all that a row's values are made of, so that one read or copy brings it, and it is decoded where it is
used. Released tables are kept so in 8 bits, with one scale for the row or one for each 32 values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from engram.config import require, require_one_of
from engram.memory.microscaling import BLOCK, from_codes, smallest_scales, to_codes

RowKind = Literal["float", "int8", "fp8", "fp8_block32"]


@dataclass(frozen=True)
class FloatRows:
    """Rows as they are: `width` numbers of type `dtype`."""

    kind: ClassVar[RowKind] = "float"
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a record."""
        return self.width * self.dtype.itemsize

    def encode(self, values: Tensor) -> Tensor:
        """Values `[..., width]` -> records `[..., row_bytes]`, uint8."""
        return values.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, records: Tensor) -> Tensor:
        """Records `[..., row_bytes]` -> values `[..., width]`."""
        return records.view(self.dtype)


@dataclass(frozen=True)
class ScaledRows:
    """`width` codes of 8 bits and a float32 scale; values come out as `dtype`.

    With s the scale, which is max|x| / 127 or / 448, but 2**-126 at least, an int8 value is off by s / 2 at most, one
    of fp8 (e4m3) by |x| / 16 or s / 1024, whichever is more; then it is rounded to `dtype`.
    """

    width: int
    dtype: torch.dtype
    kind: ClassVar[RowKind]
    code: ClassVar[torch.dtype]
    largest: ClassVar[float]

    @property
    def row_bytes(self) -> int:
        """Bytes of a record."""
        return self.width + 4

    def encode(self, values: Tensor) -> Tensor:
        """Values `[..., width]` -> records `[..., row_bytes]`, uint8. Raises `ConfigError` unless all are finite."""
        x = _finite(values)
        # Not below the least normal number: the inverse must be finite.
        scale = (x.abs().amax(-1, keepdim=True) / self.largest).clamp_min(torch.finfo(torch.float32).tiny)
        codes = self._round((x / scale).clamp(-self.largest, self.largest))
        return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1)

    def decode(self, records: Tensor) -> Tensor:
        """Records `[..., row_bytes]` -> values `[..., width]`."""
        codes, scale = records.split([self.width, 4], dim=-1)
        scale = scale.clone(memory_format=torch.contiguous_format).view(torch.float32)  # on a boundary of its type
        return (codes.view(self.code).float() * scale).to(self.dtype)

    def _round(self, x: Tensor) -> Tensor:
        return x.to(self.code)


class Int8Rows(ScaledRows):
    """Rows in whole numbers of -127 to 127."""

    kind = "int8"
    code = torch.int8
    largest = 127.0

    def _round(self, x: Tensor) -> Tensor:
        return x.round().to(self.code)


class Float8Rows(ScaledRows):
    """Rows in floats of 4 bits exponent and 3 bits mantissa."""

    kind = "fp8"
    code = torch.float8_e4m3fn
    largest = 448.0


@dataclass(frozen=True)
class BlockFloat8Rows:
    """`width` codes of 8 bits (e4m3), then a power of two (e8m0) for each 32 of them; values come out as `dtype`.

    DeepSeek-V4.1's tables are such. With s the scale, the smallest that holds the 32, a value is off by |x| / 16 or
    s / 1024, whichever is more; bfloat16 holds the result exactly.
    """

    kind: ClassVar[RowKind] = "fp8_block32"
    width: int
    dtype: torch.dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of a record."""
        return self.width + -(-self.width // BLOCK)

    def encode(self, values: Tensor) -> Tensor:
        """Values `[..., width]` -> records `[..., row_bytes]`, uint8. Raises `ConfigError` unless all are finite."""
        # Above the largest number of four bits, codes would round up to infinity.
        blocks = self._blocks(_finite(values).clamp(-self._largest, self._largest))
        scales = smallest_scales(blocks)
        codes = to_codes(blocks, scales).view(torch.uint8).flatten(-2)[..., : self.width]
        return torch.cat([codes, scales.view(torch.uint8)], dim=-1)

    def decode(self, records: Tensor) -> Tensor:
        """Records `[..., row_bytes]` -> values `[..., width]`."""
        codes, scales = records[..., : self.width], records[..., self.width :]
        blocks = self._blocks(codes).view(torch.float8_e4m3fn)
        values = from_codes(blocks, scales.view(torch.float8_e8m0fnu))
        return values.flatten(-2)[..., : self.width].to(self.dtype).contiguous()

    @property
    def _largest(self) -> float:
        """The largest finite value, in `dtype` and float32, that has no more than the four bits of a code."""
        _, exponent = math.frexp(min(torch.finfo(self.dtype).max, torch.finfo(torch.float32).max))
        return math.ldexp(0b1111, exponent - 4)

    def _blocks(self, x: Tensor) -> Tensor:
        """`[..., width]` -> `[..., blocks, 32]`, the last one filled up with 0."""
        return pad(x, (0, -self.width % BLOCK)).unflatten(-1, (-1, BLOCK))


RowFormat = FloatRows | ScaledRows | BlockFloat8Rows
FORMATS: dict[RowKind, Callable[[int, torch.dtype], RowFormat]] = {
    "float": FloatRows,
    "int8": Int8Rows,
    "fp8": Float8Rows,
    "fp8_block32": BlockFloat8Rows,
}


def row_format(kind: RowKind, width: int, dtype: torch.dtype) -> RowFormat:
    """The format of rows that give `width` numbers of type `dtype`. Raises `ConfigError` for another kind."""
    require_one_of("row format", kind, RowKind)
    return FORMATS[kind](width, dtype)


def _finite(values: Tensor) -> Tensor:
    """Values in float32. Raises `ConfigError` unless all are finite."""
    x = values.float()
    require(bool(x.isfinite().all()), "values to be quantized", "inf or nan", "finite numbers")
    return x
