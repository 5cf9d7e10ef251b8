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
    same as a mask `[B, 1, T, T]` where a mask is needed (None: all earlier positions of the row).

    query_scale: of queries of which but a part is turned (latent attention); what is turned grows by its angles.
    """

    cos: Tensor
    sin: Tensor
    starts: Tensor | None
    mask: Tensor | None
    query_scale: float


def rotated_dim(config: GQAConfig | MLAConfig) -> int:
    """How many channels of a head turn with its position."""
    return config.head_dim if isinstance(config, GQAConfig) else config.qk_rope_head_dim


def angles_of(positions: Tensor, config: GQAConfig | MLAConfig) -> tuple[Tensor, Tensor, float]:
    """Cosines and sines of positions `[T]`, and the scale of queries, such that scores are YaRN's where it is on.

    Its temperature is that of whole scores. Where heads turn whole, cosines and sines can carry it, at no cost.
    """
    cos, sin = rotations(positions, rotated_dim(config), config.rope_theta, config.yarn)
    if config.yarn is None:
        return cos, sin, 1.0
    grown = config.yarn.attention_factor
    return (cos * grown, sin * grown, 1.0) if isinstance(config, GQAConfig) else (cos, sin, grown**2)


def positions_of(token_ids: Tensor, document_ids: Tensor | None, config: GQAConfig | MLAConfig) -> Positions:
    """Angles and mask for ids `[B, T]`: a token sees its own document's tokens up to itself."""
    T, device = token_ids.shape[1], token_ids.device
    cos, sin, query_scale = angles_of(torch.arange(T, device=device), config)
    if document_ids is None:
        return Positions(cos, sin, None, None, query_scale)
    if has_attention(device.type):
        changes = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
        starts = torch.where(changes, torch.arange(T, device=device), 0).cummax(1).values
        return Positions(cos, sin, starts, None, query_scale)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return Positions(cos, sin, None, (same & causal).unsqueeze(1), query_scale)


class Places(NamedTuple):
    """Where the T new tokens of a step stand.

    slots: `[T]`, their places in the caches, which have `capacity` of them. cos, sin: angles `[B T, dim / 2]`.
    query_scale: as in `Positions`. visible: `[B, 1, T, capacity]`, which slots each one sees. alone: in the first step,
    in which they see each other alone, the positions that attention without caches takes.
    """

    slots: Tensor
    capacity: int
    cos: Tensor
    sin: Tensor
    query_scale: float
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
