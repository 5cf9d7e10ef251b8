"""Rotary positions (arXiv:2104.09864), in the half-split layout of Llama: dimension i turns with i + d/2."""

import torch
from torch import Tensor


def rotations(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of positions `[T]`, `[T, dim / 2]` each, float32."""
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = torch.outer(positions.float(), frequencies)
    return angles.cos(), angles.sin()
