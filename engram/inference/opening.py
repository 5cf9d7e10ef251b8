"""The model that a path leads to: a folder of `save_model`, a run's folder, or one of its checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer

from engram.backbone import EngramLM
from engram.config import ConfigError, ModelConfig
from engram.parallel.checkpoint import CHECKPOINTS, is_checkpoint, last_checkpoint, load, read_run
from engram.training.tokenizer import load_tokenizer
from engram.training.weights import load_model


def open_model(path: str | Path) -> tuple[EngramLM, Tokenizer | None]:
    """A model in evaluation mode, on the CPU, and the tokenizer it was trained with if that is there too.

    Args:
        path: a model's folder (`config.json`), a run's folder (its `model`, or if that is not there its last
            checkpoint), or a checkpoint's folder.

    Raises:
        ConfigError: naming the path, if it leads to no model, or to one that can't be read.
    """
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            named = candidate / "tokenizer.json"
            return load_model(candidate).eval(), load_tokenizer(str(named)) if named.is_file() else None
    checkpoint = last_checkpoint(folder / CHECKPOINTS) or folder
    if not is_checkpoint(checkpoint):
        raise ConfigError(f"{str(folder)!r} is no model's folder, no run's, and no checkpoint's")
    run = read_run(checkpoint)
    with torch.random.fork_rng(devices=[]):
        model = EngramLM(ModelConfig.from_dict(run["model_config"]), run["token_lookup"])
    load(checkpoint, model)
    text = run["tokenizer_json"]
    return model.eval(), Tokenizer.from_str(text) if text is not None else None
