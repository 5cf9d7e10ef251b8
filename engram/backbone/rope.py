"""Rotary positions (arXiv:2104.09864), in the half-split layout of Llama: dimension i turns with i + d/2.

YaRN (arXiv:2309.00071) slows the channels down that would turn further than they did in training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engram.config import YarnConfig


def rotations(positions: Tensor, dim: int, theta: float, yarn: YarnConfig | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles of positions `[T]`, `[T, dim / 2]` each, float32."""
    angles = torch.outer(positions.float(), frequencies(dim, theta, yarn, positions.device))
    return angles.cos(), angles.sin()


def frequencies(dim: int, theta: float, yarn: YarnConfig | None, device: torch.device | None = None) -> Tensor:
    """By how much each pair of channels turns from one position to the next, `[dim / 2]` radians, float32."""
    own = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if yarn is None:
        return own
    first, last = (_turning(n, dim, theta, yarn.original_max_seq_len) for n in (yarn.beta_fast, yarn.beta_slow))
    first, last = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
    pair = torch.arange(dim // 2, device=device, dtype=torch.float32)
    slowed = ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    return own.lerp(own / yarn.factor, slowed)


def _turning(times: float, dim: int, theta: float, length: int) -> float:
    """Which pair of channels, as a real number, turns so many times in `length` positions."""
    return dim * math.log(length / (2 * math.pi * times)) / (2 * math.log(theta))
