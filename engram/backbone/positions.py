"""Where tokens stand and what they may see: what attention needs of positions, the same in all blocks.

In training all tokens of a batch are there at once; in decoding new ones follow those that caches hold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.backbone.rope import rotations
from engram.config import GQAConfig, MLAConfig
from engram.kernels import has_attention


class Positions(NamedTuple):
    """Rotation angles `[T, dim / 2]`, and what each position may see: all from `starts` `[B, T]` up to itself, and the
    same as a mask `[B, 1, T, T]` where a mask is needed (None: all earlier positions of the row)."""

    cos: Tensor
    sin: Tensor
    starts: Tensor | None
    mask: Tensor | None


def rotated_dim(config: GQAConfig | MLAConfig) -> int:
    """How many channels of a head turn with its position."""
    return config.head_dim if isinstance(config, GQAConfig) else config.qk_rope_head_dim


def positions_of(token_ids: Tensor, document_ids: Tensor | None, config: GQAConfig | MLAConfig) -> Positions:
    """Angles and mask for ids `[B, T]`: a token sees its own document's tokens up to itself."""
    T, device = token_ids.shape[1], token_ids.device
    cos, sin = rotations(torch.arange(T, device=device), rotated_dim(config), config.rope_theta)
    if document_ids is None:
        return Positions(cos, sin, None, None)
    if has_attention(device.type):
        changes = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
        starts = torch.where(changes, torch.arange(T, device=device), 0).cummax(1).values
        return Positions(cos, sin, starts, None)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return Positions(cos, sin, None, (same & causal).unsqueeze(1))


class Places(NamedTuple):
    """Where the T new tokens of a step stand.

    slots: `[T]`, their places in the caches, which have `capacity` of them. cos, sin: angles `[B T, dim / 2]`. visible:
    `[B, 1, T, capacity]`, which slots each one sees. alone: in the first step, in which they see each other alone, the
    positions that attention without caches takes.
    """

    slots: Tensor
    capacity: int
    cos: Tensor
    sin: Tensor
    visible: Tensor
    alone: Positions | None


class BlockCache:
    """What a block's attention keeps of each position: tensors `[B, S, ...]`, made by its first step."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, ...] = ()

    def extend(self, places: Places, *new: Tensor) -> tuple[Tensor, ...]:
        """Keep what is new, `[B, T, ...]`; returns all that is kept, `[B, S, ...]`."""
        if not self.tensors:
            self.tensors = tuple(x.new_zeros(x.shape[0], places.capacity, *x.shape[2:]) for x in new)
        for kept, x in zip(self.tensors, new, strict=True):
            kept.index_copy_(1, places.slots, x.to(kept.dtype))
        return self.tensors


class Continuation(NamedTuple):
    """New tokens for one block: their places, and what its attention keeps of those before."""

    places: Places
    cache: BlockCache
