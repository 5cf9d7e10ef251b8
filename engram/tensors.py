"""What every layer asks of a tensor, whatever the layer: the types to compute in, and ids within bounds."""

from __future__ import annotations

import torch
from torch import Tensor

from engram.config import require


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is that: the types in which norms, angles and softmaxes are computed."""
    return x if x.dtype == torch.float64 else x.float()


def product_type(x: Tensor) -> torch.dtype:
    """The type in which matrices multiply `x` here: autocast's where it is on, else its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def require_ids(ids: Tensor, size: int) -> None:
    """Raise `ConfigError`, naming the worst of them, unless all token ids lie in 0 .. size - 1.

    Only on the CPU and in eager mode: elsewhere a look at the values would make the host wait for the device.
    """
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(end) for end in ids.aminmax())
        require(low >= 0 and high < size, "token id", low if low < 0 else high, f"0 to {size - 1}")
