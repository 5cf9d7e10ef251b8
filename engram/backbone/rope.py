"""Rotary positions (arXiv:2104.09864), in the half-split layout of Llama: dimension i turns with i + d/2."""

import torch
from torch import Tensor


def rotations(T: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of positions 0 to T-1, `[T, dim / 2]` each, float32."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angles = torch.outer(torch.arange(T, device=device, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()
