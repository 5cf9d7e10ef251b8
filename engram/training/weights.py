"""Trained models on disk: safetensors, the config as JSON, and the tokenizer they were trained with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from engram.backbone import EngramLM
from engram.config import ConfigError, ModelConfig
from engram.training.atomic import atomic_folder
from engram.training.cache import disk_errors_name
from engram.training.identity import require_same_tokenizer, tokenizer_identity
from engram.training.tokenizer import load_tokenizer

_WEIGHTS, _CONFIG, _TOKENIZER = "model.safetensors", "config.json", "tokenizer.json"
_LOOKUP = "token_lookup"


def save_model(
    model: EngramLM, folder: str | Path, lookup: Tensor | None = None, tokenizer: Tokenizer | None = None
) -> Path:
    """Write a model to a folder, whole or not at all; other files in the folder stay.

    `lookup` `[V]`: the token compression, and `tokenizer`: the tokenizer it was trained with. Raises `ConfigError`
    naming the file when the disk refuses.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if lookup is not None:
        tensors[_LOOKUP] = lookup.cpu().contiguous()
    with atomic_folder(folder, owned=(_WEIGHTS, _CONFIG, _TOKENIZER)) as draft:
        with disk_errors_name(folder / _WEIGHTS):
            try:
                save_file(tensors, draft / _WEIGHTS)
            except SafetensorError as error:  # safetensors tells of the disk in words alone
                raise ConfigError(f"cannot write {str(folder / _WEIGHTS)!r}: {error}") from error
            (draft / _WEIGHTS).chmod(0o644)  # safetensors lets nobody else read it
        texts = {_CONFIG: json.dumps(model.config.to_dict(), indent=1) + "\n"}
        if tokenizer is not None:
            texts[_TOKENIZER] = tokenizer.to_str(pretty=True)
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
        with safe_open(folder / _WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
        raise ConfigError(f"{str(folder)!r}: {_WEIGHTS} does not fit {_CONFIG}: {reason}") from error
    return model
