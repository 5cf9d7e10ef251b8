"""Trained models on disk: safetensors, the config as JSON, and the tokenizer they were trained with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from engram.backbone import EngramLM
from engram.config import ConfigError, ModelConfig
from engram.parallel.checkpoint import read_run
from engram.parallel.consolidate import INDEX, WEIGHTS, consolidate
from engram.training.atomic import atomic_folder
from engram.training.cache import disk_errors_name
from engram.training.identity import require_same_tokenizer, tokenizer_identity
from engram.training.tokenizer import load_tokenizer

_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
_LOOKUP = "token_lookup"


def save_model(
    model: EngramLM, folder: str | Path, lookup: Tensor | None = None, tokenizer: Tokenizer | None = None
) -> Path:
    """Write a model to a folder, whole or not at all; other files in the folder stay.

    `lookup` `[V]`: the token compression, and `tokenizer`: the tokenizer it was trained with. Raises `ConfigError`
    naming the file when the disk refuses.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if lookup is not None:
        tensors[_LOOKUP] = lookup.cpu().contiguous()

    def write(draft: Path) -> None:
        try:
            save_file(tensors, draft / WEIGHTS, {"format": "pt"})
        except SafetensorError as error:  # safetensors tells of the disk in words alone
            raise ConfigError(f"cannot write {str(Path(folder) / WEIGHTS)!r}: {error}") from error
        (draft / WEIGHTS).chmod(0o644)  # safetensors lets nobody else read it

    text = tokenizer.to_str(pretty=True) if tokenizer is not None else None
    return _write_folder(Path(folder), write, model.config.to_dict(), text)


def save_checkpoints_model(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write the model of a checkpoint, saved by any number of processes, to a folder as `save_model` does, in files of
    up to 32 GiB; it is never held in memory.

    Raises `ConfigError` naming the checkpoint if it can't be read, or the file when the disk refuses.
    """
    run = read_run(Path(checkpoint))
    lookup = {} if run["token_lookup"] is None else {_LOOKUP: run["token_lookup"]}
    return _write_folder(
        Path(folder),
        lambda draft: consolidate(Path(checkpoint), draft, lookup),
        run["model_config"],
        run["tokenizer_json"],
    )


def _write_folder(
    folder: Path, write_weights: Callable[[Path], object], config: dict[str, Any], tokenizer: str | None
) -> Path:
    with atomic_folder(folder, owned=(WEIGHTS, INDEX, _CONFIG, _TOKENIZER)) as draft:
        with disk_errors_name(folder / WEIGHTS):
            write_weights(draft)
        texts = {_CONFIG: json.dumps(config, indent=1) + "\n"} | ({} if tokenizer is None else {_TOKENIZER: tokenizer})
        for name, text in texts.items():
            with disk_errors_name(folder / name):
                (draft / name).write_text(text, encoding="utf-8")
    return folder


def load_model(folder: str | Path, tokenizer: Tokenizer | None = None) -> EngramLM:
    """The model that `save_model` wrote, on the CPU.

    Raises `ConfigError` for a folder that holds none, or weights that do not fit its config, and for a `tokenizer`
    other than the model's own.
    """
    folder = Path(folder)
    try:
        config = ModelConfig.from_dict(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
        tensors = {name: tensor for path in _weight_files(folder) for name, tensor in _read(path).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{str(folder)!r} holds no model that can be read: {' '.join(str(error).split())}") from error
    if tokenizer is not None and (folder / _TOKENIZER).exists():
        saved = tokenizer_identity(load_tokenizer(str(folder)), str(folder))
        require_same_tokenizer(tokenizer_identity(tokenizer, "the tokenizer given"), saved)
    with torch.random.fork_rng(devices=[]):  # weights are overwritten: the caller's random state stays as it was
        model = EngramLM(config, tensors.pop(_LOOKUP, None))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{str(folder)!r}: weights do not fit {_CONFIG}: {reason}") from error
    return model


def _weight_files(folder: Path) -> list[Path]:
    """The one file, or those that the index names."""
    if not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    names = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
