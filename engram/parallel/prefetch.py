"""Rows of sharded tables on their way before they are read: they depend on token ids alone (arXiv:2601.07372, section
2.5).

While a batch is computed, the next one's row indices are exchanged; its rows are sent when the step begins, as the last
one has moved them, and arrive while the blocks before the memory layer run.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from engram.backbone import EngramLM
from engram.memory import RowReader
from engram.parallel.table import ShardedTable


class Prefetch:
    """For each batch `start`, then the model's forward pass in training mode, then `ask`.

    All processes must call it for the same steps. What is computed is the same as without.

    Args:
        model: one that `parallelize` has spread.
    """

    def __init__(self, model: EngramLM) -> None:
        parts = [dict(memory.named_children()) for memory in model.modules() if hasattr(memory, "reader")]
        self._tables = [
            (cast(RowReader, part["reader"]), table)
            for part in parts
            if isinstance(table := part.get("table"), ShardedTable)
        ]
        self._ready = False

    def start(self, ids: Tensor, documents: Tensor | None, next_ids: Tensor, next_documents: Tensor | None) -> None:
        """Send for the rows of a batch `[B, T]`, and begin the exchange for the one after it."""
        if not self._ready:
            self._prepare(ids, documents)
            self._ready = True
        for _, table in self._tables:
            table.fetch_ahead()
        self._prepare(next_ids, next_documents)

    def ask(self) -> None:
        """Send the next batch's indices; by now everybody has told how many there are."""
        for _, table in self._tables:
            table.ask_ahead()

    def _prepare(self, ids: Tensor, documents: Tensor | None) -> None:
        for reader, table in self._tables:
            table.prepare(reader(ids, documents))
