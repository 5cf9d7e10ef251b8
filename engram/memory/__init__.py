"""Conditional memory: rows of large tables, picked by the last few token ids (arXiv:2601.07372)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from engram.config import MemoryConfig, MemoryKind
from engram.memory.baselines import AdditiveBigram, OverEncoding, UngatedMemory
from engram.memory.compression import TokenCompressor
from engram.memory.hashing import HashState, NgramHasher, table_sizes
from engram.memory.layer import Engram, EngramState
from engram.memory.offloaded import DiskTable, HostTable, OffloadedTable
from engram.memory.read_only import ReadOnlyTable
from engram.memory.readers import RowReader
from engram.memory.table import MemoryTable

__all__ = [
    "MEMORIES",
    "AdditiveBigram",
    "DiskTable",
    "Engram",
    "EngramState",
    "HashState",
    "HostTable",
    "Memory",
    "MemoryModules",
    "MemoryTable",
    "NgramHasher",
    "OffloadedTable",
    "OverEncoding",
    "ReadOnlyTable",
    "RowReader",
    "TokenCompressor",
    "build_memory",
    "table_sizes",
]


Memory = Engram | UngatedMemory


class MemoryModules(NamedTuple):
    """The memories of a model: at most one on the token embedding, and those before the attention of blocks.

    Each is called with `(hidden, token_ids, document_ids=None, padding_mask=None)` and returns an update of `hidden`;
    `look_up` and `add_to` do the same in two stages, of which the first needs ids alone; `init_state`, `step` and
    `rollback` are for decoding.
    """

    at_input: nn.Module | None
    at_block: dict[int, nn.Module]


def _engram(config: MemoryConfig, n_layers: int, lookup: Tensor | None) -> MemoryModules:
    return MemoryModules(None, {layer: Engram(config, layer, lookup) for layer in config.layers})


def _over_encoding(config: MemoryConfig, n_layers: int, lookup: Tensor | None) -> MemoryModules:
    return MemoryModules(OverEncoding(config, lookup), {})


def _additive_bigram(config: MemoryConfig, n_layers: int, lookup: Tensor | None) -> MemoryModules:
    owner = AdditiveBigram(config, None, lookup)
    at_block: dict[int, nn.Module] = {0: owner}
    at_block.update({layer: AdditiveBigram(config, owner) for layer in range(1, n_layers)})
    return MemoryModules(None, at_block)


MEMORIES: dict[MemoryKind, Callable[[MemoryConfig, int, Tensor | None], MemoryModules]] = {
    "engram": _engram,
    "capacity_one": _engram,
    "shuffled": _engram,
    "frozen_random": _engram,
    "over_encoding": _over_encoding,
    "additive_bigram": _additive_bigram,
}


def build_memory(config: MemoryConfig, n_layers: int, lookup: Tensor | None = None) -> MemoryModules:
    """The memory modules that `config.kind` names, for a model of `n_layers` blocks."""
    return MEMORIES[config.kind](config, n_layers, lookup)
