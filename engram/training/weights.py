"""Trained models on disk: safetensors with their checksums, config and tokenizer as JSON.

Nothing in such a folder is ever executed: all of it is JSON and numbers. The header of each file of weights says what
they were trained with, so that a table is never read by another hash, seed, size or token compression.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from engram.backbone import EngramLM
from engram.config import ConfigError, ModelConfig, require
from engram.digests import CHECKED_BYTES
from engram.memory import ReadOnlyTable
from engram.memory.readers import RowReader
from engram.memory.table import tables_in
from engram.parallel.checkpoint import read_run
from engram.parallel.consolidate import INDEX, PARTS, WEIGHTS, consolidate
from engram.tensor_files import Header, map_tensors, read_header, read_index
from engram.training.atomic import atomic_folder
from engram.training.cache import disk_errors_name
from engram.training.checksums import CHECKSUMS, Advance, checked_header, damages, read_checksums, write_checksums
from engram.training.identity import ORIGIN, origin_of, require_origin
from engram.training.tokenizer import SPECIAL, load_tokenizer, special_ids

_CONFIG, _TOKENIZER, _TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
# By which transformers' Auto classes find `engram.interop.causal_lm`.
_FOR_TRANSFORMERS = {"model_type": "engram", "architectures": ["EngramForCausalLM"]}
_LOOKUP = "token_lookup"
TRAINED_WITH = "trained_with"  # the origin in a config.json of transformers, which writes its own metadata
_NO_CHECKSUMS = f"there is no {CHECKSUMS}"


def save_model(
    model: EngramLM, folder: str | Path, lookup: Tensor | None = None, tokenizer: Tokenizer | None = None
) -> Path:
    """Write a model to a folder, whole or not at all; other files in the folder stay.

    `lookup` `[V]`: the token compression, the model's own if None, and `tokenizer`: the tokenizer it was trained with.
    Raises `ConfigError` naming the file when the disk refuses, and as `require_float_rows`.
    """
    require_float_rows(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if lookup is None:
        lookup = next((part.lookup for part in model.modules() if isinstance(part, RowReader)), None)
    if lookup is not None:
        tensors[_LOOKUP] = lookup.cpu().contiguous()
    text = None if tokenizer is None else tokenizer.to_str()

    def write(draft: Path, metadata: dict[str, str]) -> list[Path]:
        write_tensors(tensors, draft / WEIGHTS, Path(folder) / WEIGHTS, metadata)
        return [draft / WEIGHTS]

    return _write_folder(Path(folder), write, model.config, lookup, text)


def require_float_rows(model: nn.Module) -> None:
    """Raises `ConfigError` naming a table whose rows are quantized: what is saved of it could not be loaded."""
    for name, _, _, table in tables_in(model):
        kind = table.format.kind if isinstance(table, ReadOnlyTable) else "float"
        require(kind == "float", f"rows of {name}", kind, "float in what is saved: save the model as it was before")


def write_tensors(tensors: dict[str, Tensor], draft: Path, path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file at `draft`, which is to become `path`. Raises `ConfigError` naming that when the disk
    refuses."""
    try:
        save_file(tensors, draft, {"format": "pt", **metadata})
    except SafetensorError as error:  # safetensors tells of the disk in words alone
        raise ConfigError(f"cannot write {str(path)!r}: {error}") from error
    draft.chmod(0o644)  # safetensors lets nobody else read it


def save_checkpoints_model(checkpoint: str | Path, folder: str | Path) -> Path:
    """Write the model of a checkpoint, saved by any number of processes, to a folder as `save_model` does, in files of
    up to 32 GiB; it is never held in memory.

    Raises `ConfigError` naming the checkpoint if it can't be read, or the file when the disk refuses.
    """
    run = read_run(Path(checkpoint))
    lookup = run["token_lookup"]
    return _write_folder(
        Path(folder),
        lambda draft, metadata: consolidate(
            Path(checkpoint), draft, {} if lookup is None else {_LOOKUP: lookup}, metadata
        ),
        ModelConfig.from_dict(run["model_config"]),
        lookup,
        run["tokenizer_json"],
    )


def _write_folder(
    folder: Path,
    write_weights: Callable[[Path, dict[str, str]], list[Path]],
    config: ModelConfig,
    lookup: Tensor | None,
    tokenizer: str | None,
) -> Path:
    with atomic_folder(folder, owned=_owned(folder)) as draft:
        with disk_errors_name(folder / WEIGHTS):
            files = write_weights(draft, {ORIGIN: origin_of(config, lookup, tokenizer)})
        with disk_errors_name(folder / CHECKSUMS):
            write_checksums(draft, files)
        special: dict[str, int] = {}
        texts = {}
        if tokenizer is not None:
            made = Tokenizer.from_str(tokenizer)
            special = special_ids(made)
            texts[_TOKENIZER] = made.to_str(pretty=True)
            texts[_TOKENIZER_CONFIG] = _json(
                {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.max_seq_len}
                | {f"{name}_token": made.id_to_token(i) for name, i in special.items()}
            )
        ids = {f"{name}_token_id": i for name, i in special.items()}
        texts[_CONFIG] = _json(_FOR_TRANSFORMERS | ids | config.to_dict())
        for name, text in texts.items():
            with disk_errors_name(folder / name):
                (draft / name).write_text(text, encoding="utf-8")
    return folder


def _owned(folder: Path) -> list[str]:
    """Names of the files that a model's folder may have of `save_model`, the config first: no model is without it."""
    names = (_CONFIG, WEIGHTS, INDEX, CHECKSUMS, _TOKENIZER, _TOKENIZER_CONFIG)
    return [*names, *(path.name for path in folder.glob(PARTS))]


def remove_model(folder: Path) -> None:
    """Remove what `save_model` wrote to a folder, and the folder if it is empty then; other files stay."""
    for name in _owned(folder):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # there is none, or it holds more
        folder.rmdir()


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"


def load_model(folder: str | Path, tokenizer: Tokenizer | None = None, *, verify: bool = False) -> EngramLM:
    """The model that `save_model` wrote, on the CPU.

    Tables are not copied: they are the pages of the file, which are read when rows of them are first looked up. So a
    table may be larger than memory and is there at once, and processes share it. The model can be trained: a page that
    is written to becomes the process's own, and the file stays as it is. Everything else is copied.

    What is copied is compared with its checksum. So are tables of up to 1 GiB; larger ones would take as long as it
    takes to read them, so of those the size alone is checked, unless `verify` asks for all (as `verify_model` does).

    Raises `ConfigError` for a folder that holds none, for a file that is cut off or damaged and the tensor in it, for a
    config, token compression or tokenizer (also `tokenizer`, if given) other than those that the weights were trained
    with. A folder without checksums, or whose weights do not tell their origin, is loaded with a warning.
    """
    with _errors_name(Path(folder)):
        return _built(*_checked(Path(folder), tokenizer, verify))


def require_sound(folder: str | Path) -> None:
    """Check all that `load_model` checks, for weights that another library is about to load. Raises as it does."""
    with _errors_name(Path(folder)):
        _checked(Path(folder), None, False)


def _checked(
    folder: Path, tokenizer: Tokenizer | None, verify: bool
) -> tuple[ModelConfig, Tensor | None, dict[str, Tensor]]:
    """Config, token compression and all other tensors of a folder, mapped from its files."""
    config = read_config(folder)
    headers, saved = _open(folder)
    if saved is not None:
        _require_undamaged(headers, saved, None if verify else CHECKED_BYTES)
    elif verify:
        raise ConfigError(_NO_CHECKSUMS)
    else:
        warnings.warn(f"whether {str(folder)!r} is damaged is not known: {_NO_CHECKSUMS}", stacklevel=3)
    tensors = {name: tensor for path, header in headers.items() for name, tensor in map_tensors(path, header).items()}
    lookup = tensors.pop(_LOOKUP, None)
    origins = _origins(folder, headers)
    if not origins:
        warnings.warn(f"weights in {str(folder)!r} do not tell what they were trained with", stacklevel=3)
    _require_origin(folder, origins, config, lookup, tokenizer)
    return config, lookup, tensors


def verify_model(folder: str | Path, advance: Advance | None = None) -> list[str]:
    """What is damaged in the weights of a folder, a line for each tensor, by their checksums; nothing if all is well.

    `advance` is told of bytes as they are read, by several threads. Raises `ConfigError` as `load_model` for all else
    that is wrong, and if there are no checksums.
    """
    folder = Path(folder)
    with _errors_name(folder):
        headers, saved = _open(folder)
        if saved is None:
            raise ConfigError(_NO_CHECKSUMS)
        found = [
            line for path, header in headers.items() for line in damages(path, header, header.entries, saved, advance)
        ]
        if not found:
            lookups = [
                map_tensors(path, header)[_LOOKUP] for path, header in headers.items() if _LOOKUP in header.entries
            ]
            _require_origin(folder, _origins(folder, headers), read_config(folder), next(iter(lookups), None))
        return found


@contextmanager
def _errors_name(folder: Path) -> Iterator[None]:
    """Turn whatever goes wrong into an error that names the folder: its files may hold anything."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"model in {str(folder)!r} cannot be loaded: {reason}") from error


def read_config(folder: Path) -> ModelConfig:
    """The config in a model's folder, of `save_model` or of transformers. Raises `ConfigError` naming the file."""
    try:
        data = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        kind = _FOR_TRANSFORMERS["model_type"]
        require(data.get("model_type", kind) == kind, "model_type", data.get("model_type"), repr(kind))
        names = {field.name for field in dataclasses.fields(ModelConfig)}
        by_transformers = "transformers_version" in data  # which adds many a key
        ours = {*_FOR_TRANSFORMERS, *(f"{name}_token_id" for name in SPECIAL)}
        data = {name: value for name, value in data.items() if name in names or not (by_transformers or name in ours)}
        return ModelConfig.from_dict(data)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{_CONFIG}: {error}") from error


def _open(folder: Path) -> tuple[dict[Path, Header], dict[str, Any] | None]:
    """Headers of the one file, or of those that the index names; and the checksums, if there are any."""
    saved = read_checksums(folder)
    where: dict[str, str] | None = None
    names = {WEIGHTS}
    if (folder / INDEX).exists():
        where = read_index(folder / INDEX)
        names = set(where.values())
    paths = [folder / name for name in sorted(names)]
    headers = {path: read_header(path) if saved is None else checked_header(path, saved) for path in paths}
    if where is not None and where != {name: path.name for path, header in headers.items() for name in header.entries}:
        raise ConfigError(f"{INDEX} is damaged: it does not name the tensors that are in the files")
    return headers, saved


def _require_origin(
    folder: Path,
    origins: set[str],
    config: ModelConfig,
    lookup: Tensor | None,
    tokenizer: Tokenizer | None = None,
) -> None:
    tokenizers = {} if tokenizer is None else {"the tokenizer given": tokenizer}
    if (folder / _TOKENIZER).exists():
        tokenizers[_TOKENIZER] = load_tokenizer(str(folder))
    for origin in origins:
        require_origin(origin, config, lookup, tokenizers)


def _origins(folder: Path, headers: dict[Path, Header]) -> set[str]:
    """What the weights were trained with, as their files tell, or as transformers keeps it, the config's file."""
    found = {header.metadata[ORIGIN] for header in headers.values() if ORIGIN in header.metadata}
    kept = kept_origin(folder)
    return found or ({kept} if kept else set())


def kept_origin(folder: Path) -> str | None:
    """What transformers keeps of a model's origin, since it writes metadata of its own into files of weights; None if
    it kept none. Raises `ConfigError` naming the config's file if it can't be read."""
    config = folder / _CONFIG
    try:
        return json.loads(config.read_text(encoding="utf-8")).get(TRAINED_WITH) if config.exists() else None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{str(config)!r} cannot be read: {error}") from error


def _require_undamaged(headers: dict[Path, Header], saved: dict[str, Any], largest_table: int | None) -> None:
    for path, header in headers.items():
        names = [
            name
            for name, entry in header.entries.items()
            if largest_table is None or not name.endswith("table.weight") or entry.end - entry.start <= largest_table
        ]
        found = list(damages(path, header, names, saved))
        if found:
            raise ConfigError("; ".join(found))


def _built(config: ModelConfig, lookup: Tensor | None, tensors: dict[str, Tensor]) -> EngramLM:
    """The model, made of the tensors themselves: nothing is drawn that would be overwritten."""
    with torch.device("meta"):
        model = EngramLM(config, lookup)
    tables = {f"{name}.weight" for name, *_ in tables_in(model)}
    try:
        model.load_state_dict({k: v if k in tables else v.clone() for k, v in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"weights do not fit {_CONFIG}: {' '.join(str(error).split())[:200]}") from error
    return model.to("cpu")  # moves nothing, but tells tables that their weights are no longer on the meta device
