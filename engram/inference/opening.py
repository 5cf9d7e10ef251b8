"""The model that a path leads to: a folder of `save_model`, a run's folder, or one of its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from engram.backbone import EngramLM
from engram.config import ConfigError, ModelConfig, require, require_one_of
from engram.inference.offload import offload, quantize, serve
from engram.memory.row_formats import RowKind
from engram.memory.table import tables_in
from engram.parallel.checkpoint import find_checkpoint, load, read_run
from engram.training.identity import origin_of, require_origin
from engram.training.tokenizer import load_tokenizer
from engram.training.weights import load_model

Tables = Literal["device", "host", "disk"]


def open_model(
    path: str | Path,
    tables: Tables = "device",
    *,
    cache_rows: int = 0,
    rows: RowKind = "float",
    tokenizer: Tokenizer | None = None,
) -> tuple[EngramLM, Tokenizer | None]:
    """A model in evaluation mode, on the CPU, and the tokenizer it was trained with: `tokenizer`, if given, or the
    one that is there too.

    Args:
        path: a model's folder (`config.json`), a run's folder (its `model`, or if that is not there its last
            checkpoint), or a checkpoint's folder.
        tables: where memory tables stay when the model is moved: nowhere, on the host, or in the model's own files.
        cache_rows: frequent rows of each table to keep on the device, where tables stay elsewhere.
        rows: as they are (`float`), or quantized (`int8`, `fp8`, `fp8_block32`); those on disk are as they are.

    Raises:
        ConfigError: naming the path, if it leads to no model, or to one that can't be read; a tokenizer other than it
            was trained with; a place, cache or kind of rows that can't be had.
    """
    require_one_of("tables", tables, Tables)
    require(tables != "device" or not cache_rows, "cache_rows", cache_rows, "0 with tables on the device")
    require(tables != "disk" or rows == "float", "rows", rows, "float with tables on disk, in the model's own files")
    model, own, files = _open(Path(path), tokenizer)
    if tables_in(model):
        if tables == "host":
            offload(model, "host", cache_rows=cache_rows, rows=rows)
        elif tables == "disk":
            require(files is not None, "tables", tables, f"device or host for a checkpoint: {str(path)!r} is one")
            assert files is not None
            serve(model, files, cache_rows)
        elif rows != "float":
            quantize(model, rows)
    return model, tokenizer or own


def find_model(path: str | Path) -> Path:
    """The folder of a model or of a checkpoint that a path leads to, as for `open_model`. Raises `ConfigError` naming
    the path if it leads to neither."""
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(f"{str(folder)!r} is no model's folder, no run's, and no checkpoint's")
    return checkpoint


def _open(path: Path, tokenizer: Tokenizer | None) -> tuple[EngramLM, Tokenizer | None, Path | None]:
    """The model, its own tokenizer, and the folder of its safetensors if that is what it comes from."""
    folder = find_model(path)
    if (folder / "config.json").is_file():
        named = folder / "tokenizer.json"
        own = load_tokenizer(str(named)) if named.is_file() else None
        return load_model(folder, tokenizer).eval(), own, folder
    run = read_run(folder)
    text, config = run["tokenizer_json"], ModelConfig.from_dict(run["model_config"])
    if tokenizer is not None:
        require_origin(
            origin_of(config, run["token_lookup"], text),
            config,
            run["token_lookup"],
            {"the tokenizer given": tokenizer},
        )
    with torch.random.fork_rng(devices=[]):
        model = EngramLM(config, run["token_lookup"])
    load(folder, model)
    return model.eval(), Tokenizer.from_str(text) if text is not None else None, None
