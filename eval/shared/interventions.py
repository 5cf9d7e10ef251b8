"""A model's memory made to say nothing, or the wrong thing, at inference; weights and model code stay as they are.

The paper zeroes a memory's output to see what it is used for (arXiv:2601.07372, section 6); wrong rows tell apart what
rows say from what their presence does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from engram.backbone import EngramLM
from engram.config import ConfigError, require
from engram.memory import Engram, EngramState, Memory, MemoryTable, RowReader
from engram.memory.layer import Added
from engram.memory.readers import Reading

Change = Literal["zeroed", "shuffled"]
CHANGES: tuple[Change, ...] = ("zeroed", "shuffled")
_SEED = 0


@contextmanager
def suppressed(model: EngramLM, change: Change, layers: Sequence[str] = ()) -> Iterator[None]:
    """Inside, memories do as the change says; after it, and after an exception, they are as they were.

    `zeroed`: a memory adds nothing, and has no gates. Over-encoding divides the embedding and its rows by their number:
    rows are zero, and the embedding is still divided, as the blocks have learnt to read it.

    `shuffled`: each read gets another row of the same head, always the same one, so that every N-gram has a wrong row
    of its own; gates see that row too.

    Decoding states that are made inside are good for inside alone.

    Args:
        layers: which memories, by the names of `EngramLM.memories`; all of them if empty.

    Raises:
        ConfigError: a model without memory, a name that is none of its memories'.
    """
    chosen = memories_of(model, layers)
    try:
        for name, memory in chosen.items():
            _put(model, name, _CHANGED[change](memory))
        yield
    finally:
        for name, memory in chosen.items():
            _put(model, name, memory)


def memories_of(model: EngramLM, layers: Sequence[str] = (), who: str = "the model") -> dict[str, Memory]:
    """The memories of these names, all if there are none. Raises `ConfigError` as `suppressed` does, of `who`."""
    memories = model.memories()
    if not memories:
        raise ConfigError(f"{who} has no memory: there is nothing to suppress")
    for name in layers:
        require(name in memories, "layers", name, f"one of the memories of {who}: " + ", ".join(memories))
    return {name: memories[name] for name in layers or memories}


def _put(model: EngramLM, name: str, memory: nn.Module) -> None:
    if name == "input":
        model.input_memory = memory
    else:
        model.memory[name] = memory


class _Changed(nn.Module):
    """Stands in the place of a memory, as far as a model sees it."""

    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def init_state(self, batch_size: int, slack: int = 0) -> Any:
        return self.memory.init_state(batch_size, slack)

    def rollback(self, state: Any, n: Tensor) -> Any:
        return self.memory.rollback(state, n)


class _Silent(_Changed):
    """Lets the hidden state pass, and leaves its decoding state at the beginning."""

    def look_up(
        self,
        token_ids: Tensor,
        document_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        state: Any = None,
    ) -> Reading:
        none = token_ids.new_empty(*token_ids.shape, 0)
        return Reading(none, lambda: none.to(torch.get_default_dtype()), None, None)

    def add_to(self, hidden: Tensor, reading: Reading, state: Any = None) -> Added:
        return Added(hidden, None, state)


class _Rereading(_Changed):
    """Reads from another table than its own."""

    def __init__(self, memory: Memory, table: _ZeroRows | _OtherRows) -> None:
        super().__init__(memory)
        self._table = table

    def look_up(
        self,
        token_ids: Tensor,
        document_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        state: Any = None,
    ) -> Reading:
        ids = state.ids if isinstance(state, EngramState) else state
        reader, table = _source(self.memory).reader, cast(MemoryTable, self._table)  # as far as a reader knows
        return reader.read(table, token_ids, document_ids, padding_mask, ids)

    def add_to(self, hidden: Tensor, reading: Reading, state: Any = None) -> Added:
        return self.memory.add_to(hidden, reading, state)


class _ZeroRows:
    """A table whose rows are all zero."""

    def __init__(self, table: MemoryTable) -> None:
        self._table = table

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        values = self._table.start(rows)
        return lambda: torch.zeros_like(values())


class _OtherRows:
    """A table in which each head's rows have changed places, none of them left in its own.

    Each head is turned by a distance of its own, drawn by layer. Hashing has scattered the N-grams over the rows, so
    that the row at any distance has nothing to do with the one there, and a token's rows come from different N-grams.
    """

    def __init__(self, table: MemoryTable, reader: RowReader) -> None:
        self._table = table
        at = reader.hasher.layers.index(reader.layer)
        self._sizes, self._offsets = reader.hasher.moduli[at], reader.hasher.offsets[at]
        random = np.random.default_rng((_SEED, reader.layer))
        distances = random.integers(1, self._sizes.cpu().numpy())  # sizes are primes, so 2 or more
        self._distances = torch.from_numpy(distances).to(self._sizes.device)

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        return self._table.start((rows - self._offsets + self._distances) % self._sizes + self._offsets)


def _source(memory: Memory) -> Memory:
    """The memory that holds reader and table."""
    return memory if isinstance(memory, Engram) else memory.source


def _zeroed(memory: Memory) -> _Changed:
    if isinstance(memory, Engram):
        return _Silent(memory)  # its biases and convolution would make something of zero rows
    return _Rereading(memory, _ZeroRows(_source(memory).table))


def _shuffled(memory: Memory) -> _Changed:
    source = _source(memory)
    return _Rereading(memory, _OtherRows(source.table, source.reader))


_CHANGED: dict[Change, Callable[[Memory], _Changed]] = {"zeroed": _zeroed, "shuffled": _shuffled}
