"""Which rows a layer reads for its tokens: by the suffix N-grams, or, for two controls, by nothing informative.

A reader sees token ids, positions and documents, never hidden states, so its rows can be fetched ahead of time. The
controls keep every parameter and FLOP and take the information away (deepseek-ai/Engram issue 24 raises the first).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engram.config import MemoryConfig, MemoryKind, require
from engram.memory.hashing import NO_DOCUMENT, HashState, NgramHasher, deepseek_multipliers, earlier
from engram.memory.table import MemoryTable
from engram.tensors import require_ids


def documents_of(token_ids: Tensor, document_ids: Tensor | None, padding_mask: Tensor | None) -> Tensor | None:
    """Document ids `[B, T]` (int64) in which padding (False in the mask) belongs to none; None if neither is given."""
    if padding_mask is None:
        return document_ids if document_ids is None else document_ids.long()
    return _ids(document_ids, token_ids).masked_fill(~padding_mask, NO_DOCUMENT)


def _ids(document_ids: Tensor | None, token_ids: Tensor) -> Tensor:
    """Document ids in int64, 0 if none are given."""
    return torch.zeros_like(token_ids, dtype=torch.int64) if document_ids is None else document_ids.long()


class Reading(NamedTuple):
    """The rows of a stretch of tokens on their way to a memory layer: all of its work that needs token ids alone.

    rows: `[B, T, H]`. values: called once, gives them, `[B, T, H, W]`. documents: ids `[B, T]`, below 0 at padding, or
    None where all are one. ids: the reader's state after these tokens, or None where none was given.
    """

    rows: Tensor
    values: Callable[[], Tensor]
    documents: Tensor | None
    ids: HashState | None


class RowReader(nn.Module):
    """Raw token ids -> row indices of one layer: compression, then hashing.

    Args:
        config: with `vocab_size` set and rows above 0.
        layer: a block index of `config.layers`.
        lookup: raw id -> canonical id, int64 `[V]`; ids are hashed raw if None or if the config says `compress: false`.

    Raises:
        ConfigError: a `vocab_size` that is not set, a layer that is not in `config.layers`, a lookup of another length
            than `vocab_size`; when called (on the CPU, in eager mode), a token id outside the vocabulary.
    """

    lookup: Tensor | None

    def __init__(self, config: MemoryConfig, layer: int, lookup: Tensor | None = None) -> None:
        super().__init__()
        require(config.vocab_size >= 1, "memory.vocab_size", config.vocab_size, "1 or more to build a layer")
        require(layer in config.layers, "layer", layer, f"one of memory.layers {config.layers}")
        self.config, self.layer, self.vocab_size = config, layer, config.vocab_size
        self.register_buffer("lookup", None, persistent=False)
        self.compress_by(lookup if config.compress else None)

    def compress_by(self, lookup: Tensor | None) -> None:
        """Hash ids by another token compression, int64 `[V]`, or raw if None.

        Raises `ConfigError` for one of another length than `vocab_size`.
        """
        V = self.vocab_size
        if lookup is not None:
            require(len(lookup) == V, "lookup", len(lookup), f"of length vocab_size {V}")
        self.lookup = lookup.clone() if lookup is not None else None
        pad, eos = (int(lookup[i]) if lookup is not None else i for i in (self.config.pad_id, self.config.eos_id))
        n_canonical = int(lookup.max()) + 1 if lookup is not None else V
        self.hasher = NgramHasher(self.config, n_canonical, pad, eos)
        if lookup is not None and not self.hasher.moduli.is_meta:
            self.hasher.to(lookup.device)

    @property
    def n_rows(self) -> int:
        """Rows of this layer's table, all heads together."""
        return self.hasher.n_rows[self.layer]

    def forward(self, token_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        """Rows `[B, T, H]` for raw ids `[B, T]`; a change of document id starts a new document."""
        return self.hasher(self._canonical(token_ids), self.layer, document_ids)

    def read(
        self,
        table: MemoryTable,
        token_ids: Tensor,
        document_ids: Tensor | None,
        padding_mask: Tensor | None,
        state: HashState | None,
    ) -> Reading:
        """Begin to bring a table's rows for raw ids `[B, T]`, which follow `state` if one is given."""
        documents = documents_of(token_ids, document_ids, padding_mask)
        if state is None:
            rows = self(token_ids, documents)
            return Reading(rows, table.start(rows), documents, None)
        documents = _ids(documents, token_ids)
        rows, following = self.step(token_ids, state, documents)
        return Reading(rows, table.start(rows), documents, following)

    def init_state(self, batch_size: int, slack: int = 0) -> HashState:
        """The state before the first token of `batch_size` sequences, on the device where ids are hashed.

        `slack`: how many tokens `rollback` can take back at most.
        """
        return self.hasher.init_state(batch_size, slack=slack)

    def rollback(self, state: HashState, n: Tensor) -> HashState:
        """The state before the last `n` `[B]` tokens of each sequence, no more than the slack left."""
        return HashState(earlier(state.ids, n, self.hasher.pad_id), earlier(state.documents, n, NO_DOCUMENT))

    def step(self, token_ids: Tensor, state: HashState, document_ids: Tensor | None = None) -> tuple[Tensor, HashState]:
        """Rows `[B, T, H]` of T new tokens that follow `state`, and the state after them."""
        return self.hasher.step(self._canonical(token_ids), self.layer, state, document_ids)

    def _canonical(self, token_ids: Tensor) -> Tensor:
        if self.lookup is None:
            return token_ids
        require_ids(token_ids, self.vocab_size)
        return self.lookup[token_ids]


class FirstRowReader(RowReader):
    """Every N-gram reads the first row of each head: the table is there, what it is indexed by is not."""

    def forward(self, token_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return self._first_rows(super().forward(token_ids, document_ids))

    def step(self, token_ids: Tensor, state: HashState, document_ids: Tensor | None = None) -> tuple[Tensor, HashState]:
        rows, state = super().step(token_ids, state, document_ids)
        return self._first_rows(rows), state

    def _first_rows(self, rows: Tensor) -> Tensor:
        return self.hasher.offsets[self.hasher.layers.index(self.layer)].expand_as(rows)


class PositionReader(RowReader):
    """Rows drawn by a hash of position and document number, the same in every batch row, whatever the tokens are.

    Positions are counted from a row's first token that is no padding. In the state the next one stands in the place of
    past ids.
    """

    def forward(self, token_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
        return self.step(token_ids, self.init_state(len(token_ids)), document_ids)[0]

    def init_state(self, batch_size: int, slack: int = 0) -> HashState:
        next_position = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.hasher.moduli.device)
        return HashState(next_position, next_position)

    def rollback(self, state: HashState, n: Tensor) -> HashState:
        return HashState(state.ids - n.to(state.ids.device).unsqueeze(1), state.documents)

    def step(self, token_ids: Tensor, state: HashState, document_ids: Tensor | None = None) -> tuple[Tensor, HashState]:
        require_ids(token_ids, self.vocab_size)
        document = _ids(document_ids, token_ids)
        count = (document >= 0).cumsum(1)
        position = (state.ids + count - 1).clamp(min=0)
        a, b = deepseek_multipliers(self.layer, 2**31, 2, self.hasher.seed)
        at = self.hasher.layers.index(self.layer)
        # The two factors are below 2**32 and the numbers below 2**31, so that neither product overflows.
        mix = ((position * a) ^ (document * b)).unsqueeze(-1)
        rows = mix % self.hasher.moduli[at] + self.hasher.offsets[at]
        return rows, HashState(state.ids + count[:, -1:], state.documents)


READERS: dict[MemoryKind, type[RowReader]] = {
    "engram": RowReader,
    "frozen_random": RowReader,
    "capacity_one": FirstRowReader,
    "shuffled": PositionReader,
}
