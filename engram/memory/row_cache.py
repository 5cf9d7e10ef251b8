"""Hot rows of a table that lies elsewhere, kept where they are used: those read most often, by counts that age.

Rows of N-grams are read as Zipf's law says, so that a small share of a table serves most reads. Nothing is done row by
row: reads are counted in batches, and once in a period the most frequent rows change places with those that cooled.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PERIOD = 2**16  # reads between two choices of the hot rows, at least


class RowCache:
    """Up to `capacity` records of a table, found by row.

    Counts are exact while few rows are known and kept of four times the capacity, the most frequent; when the cache is
    full they halve with each choice. A row comes in when it is counted twice, or it would not be worth its copy.

    Args:
        capacity: rows to hold at most, 1 or more.
        load: distinct rows `[n]`, ascending -> their records `[n, S]`, on the device of the cache.
        row_bytes: S.
        device: where records lie.
        index: where rows are looked for: the device, or the CPU.
    """

    def __init__(
        self,
        capacity: int,
        load: Callable[[Tensor], Tensor],
        row_bytes: int,
        device: torch.device,
        index: torch.device,
    ) -> None:
        self.capacity, self.load = capacity, load
        self.rows = torch.empty(0, dtype=torch.int64, device=index)  # ascending
        self.records = torch.zeros(1, row_bytes, dtype=torch.uint8, device=device)
        self._known = torch.empty(0, dtype=torch.int64, device=index)
        self._counts = torch.empty(0, device=index)
        self._seen: list[tuple[Tensor, Tensor]] = []
        self._n_seen = 0

    def find(self, rows: Tensor) -> Tensor:
        """Where rows lie in `records`, -1 for those that don't."""
        if not len(self.rows):
            return torch.full_like(rows, -1)
        place = torch.searchsorted(self.rows, rows).clamp_max(len(self.rows) - 1)
        return torch.where(self.rows[place] == rows, place, -1)

    def count(self, rows: Tensor, counts: Tensor | None = None) -> None:
        """Note reads of rows `[n]`, each `counts` times (on the CPU), or once; after enough reads, `refresh`."""
        self._seen.append((rows, torch.ones(len(rows), device=rows.device) if counts is None else counts.float()))
        self._n_seen += len(rows) if counts is None else int(counts.sum())
        if self._n_seen >= (max(self.capacity, PERIOD) if self._full else PERIOD):
            self.refresh()

    @property
    def _full(self) -> bool:
        return len(self.rows) == self.capacity

    def refresh(self, least: int = 2) -> None:
        """Hold the rows read most often of all that were counted `least` times or are here."""
        rows = torch.cat([self._known, *(rows for rows, _ in self._seen)])
        counts = torch.cat([self._counts, *(counts for _, counts in self._seen)])
        self._seen, self._n_seen = [], 0
        known, place = rows.unique(return_inverse=True)
        total = counts.new_zeros(len(known)).index_add_(0, place, counts)
        if len(known) > 4 * self.capacity:
            kept = total.topk(4 * self.capacity).indices.sort().values
            known, total = known[kept], total[kept]
        here = self.find(known)
        worth = total.masked_fill((here < 0) & (total < least), 0)
        hot = worth.topk(min(self.capacity, len(worth))).indices
        self._hold(known[hot[worth[hot] > 0]].sort().values)
        self._known, self._counts = known, total / 2 if self._full else total

    def _hold(self, rows: Tensor) -> None:
        if not len(rows):
            return
        slots = self.find(rows)
        there, new = (slots >= 0).nonzero().squeeze(1), (slots < 0).nonzero().squeeze(1)
        records = self.records.new_empty(len(rows), self.records.shape[1])
        device = records.device
        records[there.to(device)] = self.records[slots[there].to(device)]
        if len(new):
            records[new.to(device)] = self.load(rows[new])
        self.rows, self.records = rows, records
