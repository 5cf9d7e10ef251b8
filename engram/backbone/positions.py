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


class Documents:
    """Documents that are packed into the rows of a batch, given by ids `[B, T]`, as kernels of attention want them.

    Each form is made when a block first asks for it, and kept for the others.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids.long()
        self._starts: Tensor | None = None
        self._mask: Tensor | None = None
        self._bounds: tuple[Tensor, int] | None = None

    def starts(self) -> Tensor:
        """The first position that each one sees, the start of its document, `[B, T]`."""
        if self._starts is None:
            own = torch.arange(self.ids.shape[1], device=self.ids.device)
            self._starts = torch.where(self._begins(), own, 0).cummax(1).values
        return self._starts

    def mask(self) -> Tensor:
        """Which positions each one sees, `[B, 1, T, T]`."""
        if self._mask is None:
            T = self.ids.shape[1]
            same = self.ids[:, :, None] == self.ids[:, None, :]
            self._mask = (same & torch.ones(T, T, dtype=torch.bool, device=self.ids.device).tril()).unsqueeze(1)
        return self._mask

    def bounds(self) -> tuple[Tensor, int]:
        """Where documents begin in all rows one after the other, and the end, `[n + 1]` (int32); and the longest.

        The host waits for the device here, as how many there are is seen in the data alone.
        """
        if self._bounds is None:
            begins = self._begins().index_fill(1, self.ids.new_zeros(1), True).flatten().nonzero().squeeze(1)
            bounds = F.pad(begins, (0, 1), value=self.ids.numel()).int()
            self._bounds = bounds, int(bounds.diff().max())
        return self._bounds

    def _begins(self) -> Tensor:
        return F.pad(self.ids[:, 1:] != self.ids[:, :-1], (1, 0))


class Positions(NamedTuple):
    """Rotation angles `[T, dim / 2]`, and what each position may see: its document up to itself (None: all of the row
    up to itself).

    query_scale: of queries of which but a part is turned (latent attention); what is turned grows by its angles.
    """

    cos: Tensor
    sin: Tensor
    documents: Documents | None
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
    """Angles and documents for ids `[B, T]`: a token sees its own document's tokens up to itself."""
    cos, sin, query_scale = angles_of(torch.arange(token_ids.shape[1], device=token_ids.device), config)
    return Positions(cos, sin, None if document_ids is None else Documents(document_ids), query_scale)


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
