"""Attached memory on disk, without the model: safetensors, and JSON that says what it is and what it was trained on.

A folder is refused by name if the model, its tokenizer or a file's content is not what it was. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from engram.config import ConfigError, MemoryConfig, build_config, require
from engram.interop.host import Identity
from engram.training.atomic import atomic_folder
from engram.training.cache import disk_errors_name
from engram.training.weights import write_tensors

_WEIGHTS, _ABOUT = "engram.safetensors", "engram.json"


def write_adapter(folder: Path, config: MemoryConfig, identity: Identity, tensors: dict[str, Tensor]) -> Path:
    """Write memory to a folder, whole or not at all. Raises `ConfigError` naming the file when the disk refuses."""
    with atomic_folder(folder, owned=(_WEIGHTS, _ABOUT)) as draft:
        with disk_errors_name(folder / _WEIGHTS):
            write_tensors(tensors, draft / _WEIGHTS, folder / _WEIGHTS, {})
        about: dict[str, Any] = {"memory": dataclasses.asdict(config), "base_model": dataclasses.asdict(identity)}
        about["sha256"] = {"settings": _settings_sha256(about), _WEIGHTS: _sha256(draft / _WEIGHTS)}
        with disk_errors_name(folder / _ABOUT):
            (draft / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return folder


class Saved(NamedTuple):
    """What a folder holds: the memory's config, the identity of the model it was trained on, and its weights."""

    config: MemoryConfig
    base_model: dict[str, Any]
    tensors: dict[str, Tensor]


def read_adapter(folder: Path) -> Saved:
    """Raises `ConfigError` naming the folder if it can't be read, or the file whose content is not what was written."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        _require_sum(folder / _ABOUT, _settings_sha256(about), about["sha256"]["settings"])
        _require_sum(folder / _WEIGHTS, _sha256(folder / _WEIGHTS), about["sha256"][_WEIGHTS])
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__} {' '.join(str(error).split())}"
        raise ConfigError(f"{str(folder)!r} holds no memory that can be read: {reason}") from error
    return Saved(build_config(MemoryConfig, about["memory"], "memory."), about["base_model"], tensors)


def _require_sum(path: Path, found: str, saved: str) -> None:
    require(found == saved, f"sha256 of {str(path)!r}", found[:12], f"{saved[:12]}, as when it was written")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settings_sha256(about: dict[str, Any]) -> str:
    settings = {name: about[name] for name in ("memory", "base_model")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
