"""All memory tables of a model moved to the host or to disk, or served from the files of a saved model.

Works on any module with memory layers inside. The layers stay as they are: each finds another table in the place of its
own, which brings the same rows from elsewhere (engram/memory/offloaded.py).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from engram.config import ConfigError, require
from engram.digests import CHECKED_BYTES
from engram.memory import DiskTable, MemoryTable, OffloadedTable, ReadOnlyTable, RowReader
from engram.memory.reading import ReadStats
from engram.memory.row_formats import RowKind
from engram.memory.table import tables_in
from engram.parallel.consolidate import INDEX, WEIGHTS
from engram.tensor_files import read_header, read_index
from engram.training.checksums import CHECKSUMS, checked_header, damages, read_checksums
from engram.training.identity import ORIGIN, require_rows_origin
from engram.training.weights import kept_origin

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


def offload_from(
    model: nn.Module, folder: str | Path, *, cache_rows: int = 0, verify: bool = False
) -> dict[str, DiskTable]:
    """Let a model, in place, read its tables from the saved model in `folder` (safetensors, one file or several with
    their index), where they lie; the new ones by name.

    What the model's own tables hold doesn't matter; on the meta device they take no memory. Tables of up to 1 GiB are
    compared with their checksums, larger ones only if `verify` says so, as by `load_model`: else nothing is read.

    Raises `ConfigError` for a table that isn't there, is damaged, has another size or type, or that the memory would
    read by another hash, seed, size or token compression than it was trained with. Tables without checksums, or whose
    file does not tell what they were trained with, are served with a warning.
    """
    folder = Path(folder)
    saved, kept = read_checksums(folder), kept_origin(folder)
    require(
        saved is not None or not verify, "verify", verify, f"False for a folder without {CHECKSUMS}: {str(folder)!r}"
    )
    readers = {f"{name}.weight": getattr(owner, "reader", None) for name, owner, *_ in tables_in(model)}
    unknown = []

    def check(name: str, path: Path) -> None:
        header = read_header(path) if saved is None else checked_header(path, saved)
        reader, origin = readers[name], header.metadata.get(ORIGIN, kept)
        if origin is None:
            unknown.append(name)
        elif isinstance(reader, RowReader):
            require_rows_origin(origin, reader.config, reader.lookup)
        entry = header.entries[name]
        if saved is not None and (verify or entry.end - entry.start <= CHECKED_BYTES):
            for damage in damages(path, header, [name], saved):
                raise ConfigError(damage)

    made = serve(model, folder, cache_rows, check)
    if saved is None:
        warnings.warn(f"whether tables in {str(folder)!r} are damaged is not known: no {CHECKSUMS}", stacklevel=2)
    if unknown:
        warnings.warn(f"{', '.join(unknown)} in {str(folder)!r}: what they were trained with is not told", stacklevel=2)
    return made


def serve(
    model: nn.Module, folder: Path, cache_rows: int = 0, check: Callable[[str, Path], None] | None = None
) -> dict[str, DiskTable]:
    """As `offload_from`, of a folder that is known to be sound and the model's own; or `check` is called with each
    table's name and file, and raises `ConfigError`."""
    there = read_index(folder / INDEX) if (folder / INDEX).exists() else {}

    def open_table(name: str, table: MemoryTable) -> DiskTable:
        name = f"{name}.weight"
        path = folder / there.get(name, WEIGHTS)
        served = DiskTable(path, cache_rows, name)
        ours, theirs = _size(table), _size(served)
        require(theirs == ours, f"{name} in {str(folder)!r}", theirs, f"{ours}, as in the model")
        if check is not None:
            try:
                check(name, path)
            except ConfigError as error:
                raise ConfigError(f"{name} in {str(folder)!r} cannot be served: {error}") from error
        return served.requires_grad_(table.learns if isinstance(table, ReadOnlyTable) else table.weight.requires_grad)

    return _replace(model, open_table)


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
