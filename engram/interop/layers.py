"""What readers of all released models share: a config file, sizes of tables, a layer without first values, a
checkpoint's copy."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.config import ConfigError, MemoryConfig, require
from engram.memory import Engram, MemoryTable, ReadOnlyTable, table_sizes
from engram.memory.row_formats import RowKind
from engram.training.atomic import atomic_folder

CONFIG = "config.json"
_MAX_ORDER = 64  # released models have 4 at most


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's `config.json`. Raises `ConfigError` naming it when it is missing or no mapping."""
    path = Path(folder) / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{str(path)!r} can't be read: {error}") from error
    require(isinstance(data, dict), repr(str(path)), type(data).__name__, "a mapping of settings")
    return data


def text_settings(folder: str | Path, kind: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model's text part, with `defaults` for what is not written down.

    Raises `ConfigError` naming the file for a model of another kind than `kind`, or numbers that are none or no whole
    ones.
    """
    where, config = repr(str(Path(folder) / CONFIG)), read_config(folder)
    given = config.get("text_config") or config
    found = config.get("model_type")
    require(found in (kind, f"{kind}_text"), f"{where}: model_type", found, f"{kind} or {kind}_text")
    require(isinstance(given, Mapping), f"{where}: text_config", given, "a mapping of settings")
    settings = {**defaults, **{name: given[name] for name in defaults if given.get(name) is not None}}
    for name, default in defaults.items():
        value = settings[name]
        if isinstance(default, int):
            require(type(value) is int and 0 <= value < 2**63, f"{where}: {name}", value, "a whole number of 0 or more")
        elif isinstance(default, float):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number and math.isfinite(value), f"{where}: {name}", value, "a number")
    return settings


def orders_up_to(largest: int, name: str) -> tuple[int, ...]:
    """Orders of N-grams from 2 on. Raises `ConfigError` with the setting's `name` for one that no model has."""
    require(2 <= largest <= _MAX_ORDER, name, largest, f"2 to {_MAX_ORDER}")
    return tuple(range(2, largest + 1))


@contextmanager
def errors_name(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong into a `ConfigError` that names `path`: files may hold anything."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError) and str(path) in str(error):
            raise
        reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__} {error}"
        raise ConfigError(f"{str(path)!r} can't be read: {' '.join(reason.split())}") from error


def sizes_that_fit(config: MemoryConfig, found: Mapping[str, int], where: str) -> dict[int, tuple[int, ...]]:
    """`table_sizes` of a config, for tables of which `found` tells names and rows.

    Raises `ConfigError` for a table that has no room for the heads: primes are looked for one by one, which for the
    numbers of a damaged config would take for ever.
    """
    n_heads = len(config.orders) * config.n_heads
    least = min(config.rows) * n_heads + n_heads * (n_heads - 1) // 2  # no two are the same
    for name, rows in found.items():
        require(least <= rows, f"{where}: rows of {name}", rows, f"{least} or more, from {CONFIG}")
    return table_sizes(config)


def empty_layer(config: MemoryConfig, layer: int, lookup: Tensor | None = None) -> Engram:
    """A layer whose weights have storage and no values: a large table is not drawn only to be overwritten."""
    with torch.device("meta"):
        module = Engram(config, layer, lookup)
    for part in module.modules():
        part._apply(lambda x: torch.empty_like(x, device="cpu") if x.is_meta else x, recurse=False)
    module.reader.hasher.reset_parameters()
    return module


def chosen(layers: Collection[int] | None, config: MemoryConfig) -> list[int]:
    """The blocks to read the memories of. Raises `ConfigError` for one that has none."""
    for layer in layers or ():
        require(layer in config.layers, "layers", layer, f"one of the blocks with a memory, {config.layers}")
    return list(config.layers) if layers is None else sorted(set(layers))


def require_fits(memory: Engram, layer: int, config: MemoryConfig, rows: tuple[RowKind, ...] = ("float",)) -> None:
    """Raise `ConfigError` naming the setting unless a memory is the one that a checkpoint's config describes, with a
    table in one of the formats `rows`."""
    own = replace(memory.config, table_dtype=config.table_dtype)
    for field in fields(MemoryConfig):
        wanted = getattr(config, field.name)
        require(
            getattr(own, field.name) == wanted,
            f"memory.{field.name} of block {layer}",
            getattr(own, field.name),
            f"{wanted!r}, as in the checkpoint",
        )
    require(layer in config.layers, "block of a memory", layer, f"one of {config.layers}")
    require(memory.reader.layer == layer, f"layer of the memory for block {layer}", memory.reader.layer, str(layer))
    require(isinstance(memory.table, MemoryTable), "table", type(memory.table).__name__, "a MemoryTable")
    kind = memory.table.format.kind if isinstance(memory.table, ReadOnlyTable) else "float"
    require(kind in rows, f"rows of the memory of block {layer}", kind, " or ".join(rows))


def float_rows(table: MemoryTable) -> Tensor:
    """All rows of a table of floats, `[R, width]`, where they lie."""
    return table.format.decode(table.records) if isinstance(table, ReadOnlyTable) else table.weight.detach()


@contextmanager
def copied(source: Path, folder: Path) -> Iterator[Path]:
    """Yields a copy of a checkpoint's folder to change, which takes the name `folder` when the block ends well.

    Raises `ConfigError` naming `folder` if it is `source`, or the disk refuses, and `source` if it can't be copied.
    """
    inside = folder.resolve().is_relative_to(source.resolve())
    require(not inside, "folder", str(folder), f"another than the checkpoint's own, {str(source)!r}")
    paths = sorted(source.iterdir())
    with atomic_folder(folder, owned=[path.name for path in paths]) as draft:
        for path in paths:  # contents alone: files of a hub's cache may be read-only
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            try:
                copy(path, draft / path.name)
            except OSError as error:
                reason = str(error)[:300]
                raise ConfigError(f"{str(path)!r} can't be copied to {str(folder)!r}: {reason}") from error
        yield draft
