"""Engram: hashed N-gram lookup, gate and short convolution as one layer (arXiv:2601.07372, section 2).

rows  = hash(compress(token ids))          integers, from ids alone
e     = table[rows]                         [B, T, H*W]
k, v  = W_K e, W_V e                        M keys and one value, one product
alpha = gate(h, k);  u = alpha v;  Y = SiLU(Conv1D(RMSNorm(u))) + u
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engram.config import MemoryConfig, require
from engram.kernels import linear
from engram.memory.fusion import Fusion, FusionState
from engram.memory.hashing import HashState
from engram.memory.readers import READERS, Reading
from engram.memory.table import MemoryTable, concatenated


class EngramState(NamedTuple):
    """What decoding keeps of the past: the last N-1 ids and the convolution's window. Old states stay valid."""

    ids: HashState
    fusion: FusionState


class Added(NamedTuple):
    """A hidden state with a memory's update, the gates `[B, T, M]` of a memory that has any, and the state after these
    tokens if one was given."""

    hidden: Tensor
    gates: Tensor | None
    state: Any


class Projection(nn.Linear):
    """`nn.Linear`, by a faster product where there is one.

    Biases are zero at the start: the usual draw would be larger than what small rows give, and make all keys and values
    alike.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d_memory]` -> `[..., (M + 1) d]`."""
        return linear(x, self.weight, self.bias)


class Engram(nn.Module):
    """Conditional memory in front of one block: the caller adds its output to the residual stream.

    The kinds `capacity_one`, `shuffled` and `frozen_random` are this layer with another reader, or with rows that never
    learn: every parameter and FLOP is in place.

    Args:
        config: with `d_model`, `vocab_size` and `branches` set, and rows above 0.
        layer: the block it stands before (0-based; picks multipliers and table sizes); `config.layers[0]` if None.
        lookup: raw id -> canonical id, int64 `[V]`, from `TokenCompressor.lookup`; ids are hashed raw if None or if
            the config says `compress: false`.

    Raises:
        ConfigError: a kind that is another layer, sizes that are not set, no rows, a layer that is not in
            `config.layers`, a lookup of another length than `vocab_size`; when called, a hidden state of another shape
            than config and ids ask for.
    """

    def __init__(self, config: MemoryConfig, layer: int | None = None, lookup: Tensor | None = None) -> None:
        super().__init__()
        require(config.kind in READERS, "memory.kind", config.kind, "one of " + ", ".join(READERS))
        for name in ("d_model", "vocab_size", "branches"):
            require(getattr(config, name) >= 1, f"memory.{name}", getattr(config, name), "1 or more to build a layer")
        self.config = config
        self.reader = READERS[config.kind](config, config.layers[0] if layer is None else layer, lookup)
        self.table = MemoryTable(self.reader.n_rows, config.row_width, getattr(torch, config.table_dtype))
        self.table.weight.requires_grad_(config.kind != "frozen_random")
        M, D = config.branches, config.d_model
        self.project = Projection(config.d_memory, (M + 1) * D, bias=config.bias)
        self.fusion = Fusion(config)

    def forward(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        document_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The update of the residual stream, of the shape of `hidden`.

        Args:
            hidden: `[B, T, d]`, or `[B, T, M, d]` with M = `config.branches` residual branches.
            token_ids: raw ids, `[B, T]`.
            document_ids: `[B, T]` integers from 0; N-grams and convolution stop where they change. One document if
                None.
            padding_mask: `[B, T]`, True at real tokens; the others get no update and are read by none.
        """
        return self._fuse(hidden, self.look_up(token_ids, document_ids, padding_mask), None, False).hidden

    def look_up(
        self,
        token_ids: Tensor,
        document_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        state: EngramState | None = None,
    ) -> Reading:
        """Begin to bring the rows of ids `[B, T]`, which follow `state` if one is given; the rest as `forward`.

        Called as soon as ids are known, it lets a table that is not on the device copy them while other layers compute.
        """
        ids = None if state is None else state.ids
        return self.reader.read(self.table, token_ids, document_ids, padding_mask, ids)

    def add_to(self, hidden: Tensor, reading: Reading, state: EngramState | None = None) -> Added:
        """`hidden` plus the update, in one pass, for the tokens of a `look_up` that was given the same state."""
        return self._fuse(hidden, reading, state, True)

    def init_state(self, batch_size: int, slack: int = 0) -> EngramState:
        """The state before the first token of `batch_size` sequences.

        `slack`: how many tokens `rollback` can take back at most.
        """
        ids = self.reader.init_state(batch_size, slack)
        return EngramState(ids, self.fusion.init_state(batch_size, ids.ids.device, slack))

    def step(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        state: EngramState,
        document_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, EngramState]:
        """Update for T new tokens that follow `state` (arguments as `forward`), and the state after them.

        Token by token or in chunks, the updates equal those of `forward` on the whole sequence. The given state is
        left as it was, so that rejected tokens are undone by going back to it.
        """
        reading = self.look_up(token_ids, document_ids, padding_mask, state)
        update, _, following = self._fuse(hidden, reading, state, False)
        return update, following

    def rollback(self, state: EngramState, n: Tensor) -> EngramState:
        """The state before the last `n` `[B]` (int64) tokens of each sequence.

        With what `slack` the state was made, and how many of it are used up, is for the caller to keep.
        """
        return EngramState(self.reader.rollback(state.ids, n), self.fusion.rollback(state.fusion, n))

    def _fuse(self, hidden: Tensor, reading: Reading, state: EngramState | None, residual: bool) -> Added:
        h, following = self._branches(hidden, reading.rows), None
        values = concatenated(reading.values(), self.project.weight.dtype)
        kv = self.project(values)  # M keys and the value of each token, [B, T, (M + 1) D]
        if state is None:
            fused = self.fusion(h, kv, reading.documents, residual=residual)
        else:
            assert reading.documents is not None
            assert reading.ids is not None
            fused, fusion = self.fusion.step(h, kv, reading.documents, state.fusion, residual)
            following = EngramState(reading.ids, fusion)
        return Added(fused.out.view(hidden.shape), fused.alpha, following)

    def _branches(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Hidden states as `[B, T, M, D]`."""
        M, D = self.config.branches, self.config.d_model
        h = hidden.unsqueeze(2) if hidden.ndim == 3 else hidden
        allowed = f"a hidden state [B, T, {M}, {D}]" + (f" or [B, T, {D}]" if M == 1 else "") + " for ids [B, T]"
        require(h.shape == (*rows.shape[:2], M, D), "shape of hidden", tuple(hidden.shape), allowed)
        return h
