"""All memory tables of a model moved to the host or to disk, or served from the files of a saved model.

Works on any module with memory layers inside. The layers stay as they are: each finds another table in the place of its
own, which brings the same rows from elsewhere (engram/memory/offloaded.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from engram.config import require
from engram.memory import DiskTable, MemoryTable, OffloadedTable, ReadOnlyTable, RowReader
from engram.memory.reading import ReadStats
from engram.memory.row_formats import RowKind
from engram.memory.table import tables_in
from engram.parallel.consolidate import INDEX, WEIGHTS
from engram.tensor_files import read_index

Place = Literal["host", "disk"]
Table = TypeVar("Table", bound=MemoryTable)


def offload(
    model: nn.Module,
    place: Place,
    *,
    folder: str | Path | None = None,
    cache_rows: int = 0,
    rows: RowKind = "float",
    pinned: bool = True,
) -> dict[str, OffloadedTable]:
    """Move all memory tables of a model, in place; the new ones by name. They can't be trained any more.

    Args:
        place: `host`, or `disk`, which writes a file of each table to `folder`, named after it.
        cache_rows: frequent rows of each table to keep on the device.
        rows: as they are (`float`), or quantized (`int8`, `fp8`, `fp8_block32`).
        pinned: whether the host's memory is locked for a CUDA device to read, if there is one.

    Raises `ConfigError` for a model without tables, a place that is neither, or `disk` without a folder.
    """
    require(place in get_args(Place), "place", place, "host or disk")
    require((place == "disk") == (folder is not None), "folder", folder, "a path for tables on disk, else None")

    def move(name: str, table: MemoryTable) -> OffloadedTable:
        if folder is None:
            return table.to_host(pinned, cache_rows, rows)
        return table.to_disk(Path(folder) / f"{name}.safetensors", cache_rows, rows)

    return _replace(model, move)


def offload_from(model: nn.Module, folder: str | Path, *, cache_rows: int = 0) -> dict[str, DiskTable]:
    """Let a model, in place, read its tables from the saved model in `folder` (safetensors, one file or several with
    their index), where they lie; the new ones by name.

    Nothing is read, so what the model's own tables hold doesn't matter; on the meta device they take no memory.
    Raises `ConfigError` for a table that isn't there or has another size or type.
    """
    folder = Path(folder)
    there = read_index(folder / INDEX) if (folder / INDEX).exists() else {}

    def serve(name: str, table: MemoryTable) -> DiskTable:
        name = f"{name}.weight"
        served = DiskTable(folder / there.get(name, WEIGHTS), cache_rows, name)
        ours, theirs = _size(table), _size(served)
        require(theirs == ours, f"{name} in {str(folder)!r}", theirs, f"{ours}, as in the model")
        return served.requires_grad_(table.learns if isinstance(table, ReadOnlyTable) else table.weight.requires_grad)

    return _replace(model, serve)


def quantize(model: nn.Module, rows: RowKind) -> dict[str, ReadOnlyTable]:
    """Quantize all memory tables of a model where they are, in place; the new ones by name. They can't be trained any
    more. Raises `ConfigError` for a model without tables."""
    return _replace(model, lambda name, table: table.read_only(rows))


def offloaded_tables(model: nn.Module) -> dict[str, OffloadedTable]:
    """The tables of a model that lie elsewhere, by name."""
    return {name: table for name, _, _, table in tables_in(model) if isinstance(table, OffloadedTable)}


def warm_caches(model: nn.Module, token_ids: Tensor, document_ids: Tensor | None = None) -> None:
    """Fill the caches of offloaded tables with the rows that ids `[B, T]` read most often, on the device of the ids."""
    for memory in list(model.modules()):
        reader, table = getattr(memory, "reader", None), getattr(memory, "table", None)
        if isinstance(reader, RowReader) and isinstance(table, OffloadedTable) and table.cache_rows:
            table.warm(reader(token_ids, document_ids))


def read_stats(model: nn.Module) -> ReadStats:
    """What all offloaded tables of a model did, added up."""
    return sum((table.stats() for table in offloaded_tables(model).values()), ReadStats())


def _size(table: MemoryTable) -> tuple[int, int, torch.dtype]:
    if isinstance(table, ReadOnlyTable):
        return table.n_rows, table.width, table.dtype
    n_rows, width = table.weight.shape
    return n_rows, width, table.weight.dtype


def _replace(model: nn.Module, make: Callable[[str, MemoryTable], Table]) -> dict[str, Table]:
    """Put another table in the place of each; none is replaced unless all can be made."""
    found = list(tables_in(model))
    require(bool(found), "model", type(model).__name__, "one with memory tables")
    made = {name: make(name, table) for name, _, _, table in found}
    for name, owner, attribute, _ in found:
        setattr(owner, attribute, made[name])
    return made
