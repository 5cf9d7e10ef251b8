"""A model whose table is put in its place later, and tables for it, of the host and of the device."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from engram import EngramLM, ModelConfig
from engram.backbone.initialize import materialize
from engram.memory import Engram, HostTable, OffloadedTable, ReadOnlyTable
from engram.memory.row_formats import FloatRows
from offloading.files import advise
from offloading.words import Batch

_MAP_NORESERVE = 0x4000  # mmap(2), on Linux


def build(config: ModelConfig, device: torch.device) -> tuple[EngramLM, Engram]:
    """A model in bfloat16 whose table is still to come, and its memory."""
    with torch.device("meta"):
        model = EngramLM(config).eval()
    memory = next(part for part in model.modules() if isinstance(part, Engram))
    memory.table = HostTable(
        torch.zeros(1, 2 * memory.config.row_width, dtype=torch.uint8), FloatRows(1, torch.bfloat16)
    )
    materialize(model, device, seed=0)
    model.to(torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of weights in float32
    return model, memory


def random_records(n_rows: int, fmt: FloatRows) -> Tensor:
    """Rows as they start, a block of them over and over: nothing here depends on their values."""
    # Mapped, without a promise by the system: a machine may have been given less memory so far than it will get.
    size, flags = n_rows * fmt.row_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    records = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=torch.uint8).view(n_rows, fmt.row_bytes)
    with suppress(OSError):  # where there are large pages: memory is filled, and locked for a device, page by page
        advise(records, mmap.MADV_HUGEPAGE)
    block = fmt.encode(0.02 * torch.randn(2**18, fmt.width))
    for part in records.split(len(block)):
        part.copy_(block[: len(part)])
    return records


class Folded(ReadOnlyTable):
    """A table that is too large for the device, of which it has some rows, read in the place of all: as many reads."""

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        return super().start(rows % self.n_rows)


def without_prefetch(table: OffloadedTable) -> OffloadedTable:
    """The same rows, fetched when they are asked for."""
    table.prefetch = False
    return table


def rows_of(memory: Engram, ids: Tensor, device: torch.device) -> Tensor:
    """The rows that a text reads, one long document."""
    return memory.reader(ids.to(device).unsqueeze(0))


def rows_read(memory: Engram, batch: Batch) -> Tensor:
    """All rows that serving a batch reads, in no order."""
    ids = torch.cat([batch.ids, batch.following], 1)
    mask = torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask
    padding = ~torch.cat([mask, torch.ones_like(batch.following, dtype=torch.bool)], 1)
    return memory.reader(ids, torch.zeros_like(ids).masked_fill(padding, -1))[~padding].flatten()
