"""Rivals of Engram behind the same interface: two older ways to give a model N-gram rows, neither with a gate.

Over-encoding averages them into the input embedding (arXiv:2501.16975); the additive bigram of the nanochat and
modded-nanogpt speed runs adds zero-init rows before every block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from engram.config import MemoryConfig, require
from engram.memory.hashing import HashState
from engram.memory.layer import Added
from engram.memory.readers import Reading, RowReader
from engram.memory.table import MemoryTable, concatenated


class UngatedMemory(nn.Module, ABC):
    """A memory that adds its rows without a gate, called as `Engram` is.

    Args:
        config: with `d_model`, `vocab_size` and `branches` set, and rows above 0.

    Raises:
        ConfigError: sizes that are not set, no rows, a lookup of another length than `vocab_size`; when called, a token
            id outside the vocabulary (on the CPU, in eager mode).
    """

    reader: RowReader
    table: MemoryTable

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__()
        for name in ("d_model", "branches"):
            require(getattr(config, name) >= 1, f"memory.{name}", getattr(config, name), "1 or more to build a layer")

    @property
    def source(self) -> UngatedMemory:
        """The memory whose reader and table are used: itself, unless it shares another's."""
        return self

    @abstractmethod
    def update(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """What a token's concatenated rows `[B, T, H*W]` add to `hidden`, of the shape of `hidden`."""

    def forward(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        document_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The update of `hidden`, `[B, T, d]` or `[B, T, M, d]`, for raw ids `[B, T]`; the rest as for `Engram`."""
        return self._update(hidden, self.look_up(token_ids, document_ids, padding_mask))

    def look_up(
        self,
        token_ids: Tensor,
        document_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        state: HashState | None = None,
    ) -> Reading:
        """Begin to bring the rows of ids `[B, T]`, which follow `state` if one is given."""
        return self.source.reader.read(self.source.table, token_ids, document_ids, padding_mask, state)

    def add_to(self, hidden: Tensor, reading: Reading, state: HashState | None = None) -> Added:
        """`hidden` plus the update, for the tokens of a `look_up` that was given the same state."""
        return Added(hidden + self._update(hidden, reading), None, reading.ids)

    def init_state(self, batch_size: int, slack: int = 0) -> HashState:
        """The state before the first token of `batch_size` sequences; `rollback` can take back `slack` tokens."""
        return self.source.reader.init_state(batch_size, slack)

    def rollback(self, state: HashState, n: Tensor) -> HashState:
        """The state before the last `n` `[B]` tokens of each sequence, no more than the slack left."""
        return self.source.reader.rollback(state, n)

    def step(
        self,
        hidden: Tensor,
        token_ids: Tensor,
        state: HashState,
        document_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, HashState]:
        """Update for T new tokens that follow `state`, and the state after them; the given state is left as it was."""
        reading = self.look_up(token_ids, document_ids, padding_mask, state)
        assert reading.ids is not None
        return self._update(hidden, reading), reading.ids

    def _update(self, hidden: Tensor, reading: Reading) -> Tensor:
        update = self.update(hidden, concatenated(reading.values(), hidden.dtype))
        if reading.documents is None:
            return update
        real = reading.documents >= 0
        return update * real.view(*real.shape, *[1] * (hidden.ndim - 2))


class OverEncoding(UngatedMemory):
    """N-gram embeddings averaged into the input embedding (arXiv:2501.16975, section 3.2).

    With x the token's embedding and H heads, each with its own projection W_h of its row e_h to the model's width, the
    blocks read (x + sum_h W_h e_h) / (H + 1); the update is what makes x that average. The table is that of the
    config's first layer. Rows start as small as Engram's: heads that started with the embedding's own variance ended
    0.06 nats worse in the nano model (2.2M tokens, rho 0.5).
    """

    def __init__(self, config: MemoryConfig, lookup: Tensor | None = None) -> None:
        super().__init__(config)
        self.n_heads = len(config.orders) * config.n_heads
        self.reader = RowReader(config, config.layers[0], lookup)
        self.table = MemoryTable(self.reader.n_rows, config.row_width, getattr(torch, config.table_dtype))
        # The sum of all heads' projections is one product with the concatenated rows.
        self.project = nn.Linear(config.d_memory, config.d_model, bias=False)

    def update(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """(W e - H x) / (H + 1) for embeddings x `[B, T, d]`."""
        return (self.project(rows) - self.n_heads * hidden) / (self.n_heads + 1)


class Scale(nn.Module):
    """One learned factor; a module, so that hooks that bring a module's weights when it is called bring this one."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the factor."""
        nn.init.constant_(self.weight, self.start)

    def forward(self, x: Tensor) -> Tensor:
        """`x` times the factor."""
        return self.weight * x


class AdditiveBigram(UngatedMemory):
    """Rows as wide as the model, zero at the start, added before every block with a learned scale for each block.

    One table for all blocks: the first block's module owns it, the later ones read it through that owner, so that a
    state dict holds it once. A token's row is the concatenation over the config's orders and heads, which is one whole
    row for order 2 and one head.
    """

    def __init__(self, config: MemoryConfig, owner: AdditiveBigram | None, lookup: Tensor | None = None) -> None:
        super().__init__(config)
        self.scale = Scale(0.1)
        if owner is None:
            self.reader = RowReader(config, config.layers[0], lookup)
            self.table = MemoryTable(self.reader.n_rows, config.row_width, getattr(torch, config.table_dtype), std=0.0)
        self._owner = (self if owner is None else owner,)  # in a tuple, so that the owner is not a submodule here

    @property
    def source(self) -> UngatedMemory:
        """The first block's memory."""
        return self._owner[0]

    def update(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """The rows times this block's scale; every branch gets the same."""
        update = self.scale(rows)
        return update if hidden.ndim == 3 else update.unsqueeze(2).expand_as(hidden)
