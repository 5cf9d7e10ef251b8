"""What readers of all released models share: a config file, a layer without first values, a checkpoint's copy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.config import ConfigError, MemoryConfig, require
from engram.memory import Engram, MemoryTable
from engram.training.atomic import atomic_folder

CONFIG = "config.json"


def read_config(folder: str | Path) -> dict[str, Any]:
    """A folder's `config.json`. Raises `ConfigError` naming it when it is missing or no mapping."""
    path = Path(folder) / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} can't be read: {error}") from error
    require(isinstance(data, dict), repr(str(path)), type(data).__name__, "a mapping of settings")
    return data


def text_settings(
    folder: str | Path, config: Mapping[str, Any], kind: str, defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings of a model's text part, with `defaults` for what is not written down.

    Raises `ConfigError` naming the file for a model of another kind than `kind`, or numbers that are none.
    """
    where = repr(str(Path(folder) / CONFIG))
    given = config.get("text_config") or config
    found = config.get("model_type")
    require(found in (kind, f"{kind}_text"), f"{where}: model_type", found, f"{kind} or {kind}_text")
    require(isinstance(given, Mapping), f"{where}: text_config", given, "a mapping of settings")
    settings = {**defaults, **{name: given[name] for name in defaults if given.get(name) is not None}}
    for name, default in defaults.items():
        number = isinstance(settings[name], (int, float)) and not isinstance(settings[name], bool)
        require(number or not isinstance(default, (int, float)), f"{where}: {name}", settings[name], "a number")
    return settings


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


def require_fits(memory: Engram, layer: int, config: MemoryConfig) -> None:
    """Raise `ConfigError` naming the setting unless a memory is the one that a checkpoint's config describes."""
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
    require(isinstance(memory.table, MemoryTable), "table", type(memory.table).__name__, "a MemoryTable, in memory")


@contextmanager
def copied(source: Path, folder: Path) -> Iterator[Path]:
    """Yields a copy of a checkpoint's folder to change, which takes the name `folder` when the block ends well.

    Raises `ConfigError` naming `folder` if it is `source`, or when the disk refuses.
    """
    inside = folder.resolve().is_relative_to(source.resolve())
    require(not inside, "folder", str(folder), f"another than the checkpoint's own, {str(source)!r}")
    paths = sorted(source.iterdir())
    with atomic_folder(folder, owned=[path.name for path in paths]) as draft:
        for path in paths:  # contents alone: files of a hub's cache may be read-only
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, draft / path.name)
        yield draft
