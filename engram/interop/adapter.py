"""Attached memory on disk, without the model: safetensors, and JSON that says what it is and what it was trained on.

A folder is refused by name if the model, its tokenizer or a file's content is not what it was. Nothing is unpickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engram.config import ConfigError, MemoryConfig, build_config, require
from engram.interop.attach import Attachment, attach
from engram.training.atomic import atomic_folder
from engram.training.cache import disk_errors_name

_WEIGHTS, _ABOUT = "engram.safetensors", "engram.json"


def save_adapter(attachment: Attachment, folder: Path) -> Path:
    """What `Attachment.save` does. Raises `ConfigError` naming the file when the disk refuses."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in attachment.state_dict().items()}
    with atomic_folder(folder, owned=(_WEIGHTS, _ABOUT)) as draft:
        with disk_errors_name(folder / _WEIGHTS):
            try:
                save_file(tensors, draft / _WEIGHTS, {"format": "pt"})
            except SafetensorError as error:  # safetensors tells of the disk in words alone
                raise ConfigError(f"cannot write {str(folder / _WEIGHTS)!r}: {error}") from error
            (draft / _WEIGHTS).chmod(0o644)  # safetensors lets nobody else read it
        about = {
            "memory": dataclasses.asdict(attachment.config),
            "base_model": dataclasses.asdict(attachment.identity),
            "sha256": {_WEIGHTS: _sha256(draft / _WEIGHTS)},
        }
        about["sha256"]["settings"] = _settings_sha256(about)
        with disk_errors_name(folder / _ABOUT):
            (draft / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return folder


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    freeze_backbone: bool = True,
    *,
    tokenizer: Any | None = None,
    slack: int = 32,
) -> Attachment:
    """Attach the memory that `Attachment.save` wrote; the other arguments are those of `attach`.

    Raises `ConfigError` for a folder that can't be read or was changed, and for a model or tokenizer other than those
    that the memory was trained with.
    """
    folder = Path(folder)
    about, tensors = _read(folder)
    config = build_config(MemoryConfig, about["memory"], "memory.")
    with torch.random.fork_rng(devices=[]):  # weights are overwritten: the caller's random state stays as it was
        attachment = attach(model, None, config, freeze_backbone, tokenizer=tokenizer, slack=slack)
    try:
        attachment.identity.require_same(about["base_model"])
        load_weights(attachment, tensors, folder)
    except ConfigError:
        attachment.remove()
        raise
    return attachment


def restore(attachment: Attachment, folder: Path) -> None:
    """Give attached memory the weights that were saved of it, in place. Raises `ConfigError` as `load_adapter`."""
    about, tensors = _read(folder)
    attachment.identity.require_same(about["base_model"])
    saved = build_config(MemoryConfig, about["memory"], "memory.")
    for field in dataclasses.fields(saved):
        own, its = getattr(attachment.config, field.name), getattr(saved, field.name)
        require(own == its, f"memory.{field.name}", own, f"{its!r}, as saved in {str(folder)!r}")
    load_weights(attachment, tensors, folder)


def load_weights(attachment: Attachment, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy saved tensors into the memory."""
    try:
        attachment.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{str(folder)!r}: {_WEIGHTS} does not fit {_ABOUT}: {reason}") from error


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        sums = about["sha256"]
        for name, found in ((_WEIGHTS, _sha256(folder / _WEIGHTS)), ("settings", _settings_sha256(about))):
            where = str(folder / (_ABOUT if name == "settings" else name))
            require(found == sums[name], f"sha256 of {name} in {where!r}", found[:12], f"{sums[name][:12]}: it was changed")
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{str(folder)!r} holds no memory that can be read: {type(error).__name__} {reason}") from error
    return about, tensors


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _settings_sha256(about: dict[str, Any]) -> str:
    settings = {name: about[name] for name in ("memory", "base_model")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
