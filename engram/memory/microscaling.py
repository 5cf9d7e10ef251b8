"""8-bit floats with a power of two for each block of values: E4M3 codes, E8M0 scales (OCP Microscaling Formats, 1.0).

What the two make is a bfloat16 number, but where it is below 2**-133 or above all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32  # values of a row that share a scale
_LARGEST = 448.0  # of E4M3
_BIAS = 127  # of E8M0: the byte b stands for 2**(b - 127)


def smallest_scales(blocks: Tensor) -> Tensor:
    """Finite values `[..., n]`, float32 -> E8M0 `[...]`, the smallest scale that brings all of a block within E4M3.

    It is 1 for zeros, and a normal number always: 2**-126 or more.
    """
    largest = blocks.abs().amax(-1)
    fraction, exponent = torch.frexp(largest / _LARGEST)
    exponent = torch.where(fraction == 0.5, exponent - 1, exponent)  # frexp's fractions lie in [0.5, 1)
    exponent = torch.where(largest == 0, 0, exponent).clamp(1 - _BIAS, _BIAS)
    return (exponent + _BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def to_codes(blocks: Tensor, scales: Tensor) -> Tensor:
    """Values `[..., n]`, float32, by their scales `[...]` -> E4M3 `[..., n]`; NaN stays NaN."""
    return (blocks / scales.float().unsqueeze(-1)).clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def from_codes(codes: Tensor, scales: Tensor) -> Tensor:
    """E4M3 `[..., n]` times E8M0 `[...]`, in float32."""
    return codes.float() * scales.float().unsqueeze(-1)
