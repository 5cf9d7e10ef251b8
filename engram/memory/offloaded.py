"""Tables that lie elsewhere than their rows are used: in the host's memory, or in a file on disk.

Rows are known from token ids alone, before any layer runs (arXiv:2601.07372, section 2.5), so that they are fetched
while the first blocks compute; the most frequent ones stay on the device.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from engram.config import require
from engram.kernels import gather_mapped, gather_rows, picks_from_host
from engram.kernels.library import define
from engram.memory.read_only import ReadOnlyTable
from engram.memory.reading import ReadByThread, ReadFromPinned, ReadStats
from engram.memory.row_files import map_rows
from engram.memory.row_formats import RowFormat
from engram.memory.table import table_of

_SMALL = 2**26  # bytes
_PORTABLE_AND_MAPPED = 3  # cudaHostRegister: pinned for, and within reach of, all devices
_PINNED: weakref.WeakValueDictionary[int, Pinned] = weakref.WeakValueDictionary()


class OffloadedTable(ReadOnlyTable):
    """A table whose records stay on the CPU, whatever the model is moved to; values come to where row indices are.

    A process that was forked reads by a thread, cache and counts of its own, empty at first.

    Args:
        records, fmt: as for `ReadOnlyTable`.
        cache_rows: frequent rows to keep on the device, 0 for none. The cache fills itself while rows are read.

    Attributes:
        prefetch: False lets `start` begin nothing, so that rows are fetched when they are asked for.
    """

    prefetch: bool = True

    def __init__(self, records: Tensor, fmt: RowFormat, cache_rows: int = 0) -> None:
        require(cache_rows >= 0, "cache_rows", cache_rows, "0 (no cache) or more")
        super().__init__(records, fmt)
        self.cache_rows = cache_rows
        self._ways: dict[tuple[int, torch.device], ReadByThread | ReadFromPinned] = {}  # by process and device

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        """As `MemoryTable.start`, for rows that do not change until their values are there; raises as `forward`.

        In compiled graphs nothing begins before values are wanted.
        """
        self._refuse_to_learn()
        if torch.compiler.is_compiling():
            return partial(_read_offloaded, rows, self._number)
        return self._begin(rows) if self.prefetch else lambda: self._begin(rows)()

    def warm(self, rows: Tensor) -> None:
        """Fill the cache of the device of `rows`, any shape, with the most frequent of them."""
        require(self.cache_rows >= 1, "cache_rows", self.cache_rows, "1 or more to have something to fill")
        self._way(rows.device).warm(rows)

    def stats(self) -> ReadStats:
        """What was read since the start, or since `reset_stats`, on all devices together."""
        return sum((way.stats for way in self._ways_here()), ReadStats())

    def reset_stats(self) -> None:
        """Count from 0; the cache stays."""
        for way in self._ways_here():
            way.reset_stats()

    def _begin(self, rows: Tensor) -> Callable[[], Tensor]:
        return self._way(rows.device).start(rows)

    def _way(self, device: torch.device) -> ReadByThread | ReadFromPinned:
        place = os.getpid(), device  # the threads of its parent are none of a process that was forked
        if place not in self._ways:
            self._ways[place] = self._new_way(device)
        return self._ways[place]

    def _ways_here(self) -> list[ReadByThread | ReadFromPinned]:
        return [way for (process, _), way in self._ways.items() if process == os.getpid()]

    def _new_way(self, device: torch.device) -> ReadByThread | ReadFromPinned:
        return ReadByThread(self._load, self.format, self.cache_rows, device)

    def _load(self, rows: Tensor) -> Tensor:
        return gather_rows(self.records, rows)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ways": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state | {"_ways": {}})


class HostTable(OffloadedTable):
    """Rows in the host's memory, pinned if `pinned` says so and there is a CUDA device.

    Where values are wanted on the CPU, rows are read when they are asked for, and not counted, unless there is a cache.
    """

    def __init__(self, records: Tensor, fmt: RowFormat, cache_rows: int = 0, pinned: bool = True) -> None:
        super().__init__(records, fmt, cache_rows)
        self._pinned = pinned_memory(records) if pinned and torch.cuda.is_available() else None
        if self._pinned is not None:
            self.records = self._pinned.memory

    def _begin(self, rows: Tensor) -> Callable[[], Tensor]:
        if rows.device.type == "cpu" and not self.cache_rows:
            return partial(self._values, rows)
        return super()._begin(rows)

    def _new_way(self, device: torch.device) -> ReadByThread | ReadFromPinned:
        if self._pinned is not None and device.type == "cuda" and picks_from_host():
            return ReadFromPinned(self.records, self.format, self.cache_rows, device)
        return super()._new_way(device)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_pinned": None}


class DiskTable(OffloadedTable):
    """Rows in a file, mapped and never loaded; processes that open the same file share what is in memory of it.

    Args:
        path: a file that `to_disk` wrote, or any safetensors file. It must stay as it is while it is open.
        cache_rows: as for `OffloadedTable`.
        name: of the table in the file.
        verify: compare all rows of a file that `to_disk` wrote with its checksums, not of up to 1 GiB alone.

    Raises:
        ConfigError: a file that is none, is cut short or damaged, or holds no such table; with `verify`, one without
            checksums; when a pickle is loaded, of which the file is a part, also one that holds a table of another size
            or format now.
    """

    def __init__(self, path: str | Path, cache_rows: int = 0, name: str = "weight", verify: bool = False) -> None:
        self.path, self.name = Path(path).absolute(), name
        super().__init__(*map_rows(self.path, name, verify), cache_rows)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, path={str(self.path)!r}"

    def _load(self, rows: Tensor) -> Tensor:
        return gather_mapped(self.records, rows)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"records": self.records.to("meta")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["records"].is_meta:
            there = map_rows(state["path"], state["name"])
            then, now = (state["records"].shape, state["format"]), (there.records.shape, there.format)
            require(now == then, f"{state['name']} in {str(state['path'])!r}", now, f"{then}, as it was when pickled")
            state = state | {"records": there.records}
        super().__setstate__(state)


def pinned_memory(memory: Tensor) -> Pinned:
    """Memory of the CPU, or a copy if it is small, where CUDA devices can read it."""
    if memory.numel() < _SMALL:
        return Pinned(memory.pin_memory())
    found = _PINNED.get(memory.data_ptr())  # another table may read the same rows
    if found is None or found.memory.numel() < memory.numel():
        found = _PINNED[memory.data_ptr()] = Pinned(memory)
    return found


class Pinned:
    """Keeps memory of the CPU in its place, for CUDA devices to read, as long as this object lives."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        if memory[:1].is_pinned() and memory[-1:].is_pinned():  # torch looks at the first byte alone
            return
        # Registered where it lies: torch's own pinned memory comes in powers of two, up to twice what is asked for.
        cuda, address, size = torch.cuda.cudart(), memory.data_ptr(), memory.numel()
        error = cuda.cudaHostRegister(address, size, _PORTABLE_AND_MAPPED)
        require(int(error) == 0, "pinned", True, f"False here: {size / 2**30:.1f} GiB cannot be pinned, error {error}")
        weakref.finalize(self, cuda.cudaHostUnregister, address)


def _read_now(rows: Tensor, number: int) -> Tensor:
    return _offloaded(number)._begin(rows)()


def _shape_read(rows: Tensor, number: int) -> Tensor:
    table = _offloaded(number)
    return rows.new_empty(*rows.shape, table.width, dtype=table.dtype)


def _offloaded(number: int) -> OffloadedTable:
    table = table_of(number)
    assert isinstance(table, OffloadedTable)
    return table


_read_offloaded = define("read_offloaded(Tensor rows, int number) -> Tensor", _read_now, _shape_read, replayed=False)
