"""What a model was trained with: which tokenizer, in a form that can be compared, and what goes with saved weights so
that they are never read by another hash, seed or compression than wrote them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from engram.config import ConfigError, MemoryConfig, ModelConfig
from engram.memory import TokenCompressor

ORIGIN = "engram"  # what `origin_of` wrote, in the metadata of a file of weights
# Settings of a memory that say what is done with its rows, or in what type they are.
_BEYOND_ROWS = {"table_dtype", "gate", "conv_kernel", "conv_dilation", "bias", "norm_eps", "d_model", "branches"}


def tokenizer_identity(tokenizer: Tokenizer, name: str, compressor: TokenCompressor | None = None) -> dict[str, str]:
    """A name to print, and hex SHA-256 of the tokenizer and of its compression (empty without one)."""
    compression = compressor.fingerprint if compressor else ""
    return {"name": name, "sha256": _digest(tokenizer.to_str()), "compression": compression}


def require_same_tokenizer(own: dict[str, str], saved: dict[str, str]) -> None:
    """Raise `ConfigError` naming both unless two identities are of the same tokenizer and compression."""
    for key, what in (("sha256", "tokenizer"), ("compression", "token compression")):
        if own[key] != saved[key]:
            shown = [f"{identity['name']!r} (sha256 {identity[key][:12]})" for identity in (own, saved)]
            raise ConfigError(f"{what} is that of {shown[0]}: the model was trained with that of {shown[1]}")


def origin_of(config: ModelConfig, lookup: Tensor | None, tokenizer: str | None) -> str:
    """What weights were trained with, as text to put beside them: the config, and hashes of token compression and
    tokenizer (`Tokenizer.to_str`)."""
    return json.dumps(
        {
            "config": config.to_dict(),
            "compression": _compression(lookup),
            "tokenizer": "" if tokenizer is None else _digest(tokenizer),
        }
    )


def require_origin(origin: str, config: ModelConfig, lookup: Tensor | None, tokenizers: dict[str, Tokenizer]) -> None:
    """Raise `ConfigError` unless a config, a token compression and named tokenizers are what `origin_of` wrote.

    It names everything in which they differ, with both values. Tokenizers are not compared if there was none.
    """
    trained, compression, digest = _told(origin)
    found = {"token compression": (_compression(lookup), compression)}
    if digest:
        found |= {name: (_digest(tokenizer.to_str()), digest) for name, tokenizer in tokenizers.items()}
    _require_same(_differences(config.to_dict(), trained.to_dict()), found)


def require_rows_origin(origin: str, config: MemoryConfig, lookup: Tensor | None) -> None:
    """Raise `ConfigError`, naming what differs with both values, unless a memory reads its rows as one of the model did
    that `origin_of` told of: by the same sizes, hash, seed and token compression.

    `config` and `lookup`: those of the memory's reader. What its layer does with the values may be another thing.
    """
    trained, compression, _ = _told(origin)
    own, other = (
        {} if each is None else {k: v for k, v in dataclasses.asdict(each).items() if k not in _BEYOND_ROWS}
        for each in (config, trained.memory)
    )
    found = {"token compression": (_compression(lookup), compression)} if config.compress else {}
    _require_same(_differences(own, other, "memory."), found)


def _require_same(settings: Iterable[tuple[str, Any, Any]], digests: dict[str, tuple[str, str]]) -> None:
    """Raise `ConfigError` naming settings that differ, with both values, and of things by name digests that do."""
    wrong = [f"{name} is {own!r}: the weights were trained with {other!r}" for name, own, other in settings]
    wrong += [
        f"{name} has {_shown(own)}: the weights were trained with {_shown(other)}"
        for name, (own, other) in digests.items()
        if own != other
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))


def _told(origin: str) -> tuple[ModelConfig, str, str]:
    """Config, and digests of token compression and tokenizer. Raises `ConfigError` unless `origin_of` wrote them."""
    try:
        saved = json.loads(origin)
        trained = ModelConfig.from_dict(saved["config"])  # by itself, so that settings newer than the file have a value
        return trained, str(saved["compression"]), str(saved["tokenizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"what the weights tell of their origin is damaged: {type(error).__name__} {error}"
        ) from error


def _digest(tokenizer: str) -> str:
    return hashlib.sha256(tokenizer.encode()).hexdigest()


def _compression(lookup: Tensor | None) -> str:
    """As `TokenCompressor.fingerprint`, of its map alone."""
    return "" if lookup is None else hashlib.sha256(lookup.cpu().long().numpy().tobytes()).hexdigest()


def _shown(digest: str) -> str:
    return f"sha256 {digest[:12]}" if digest else "none"


def _differences(own: dict[str, Any], other: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted names of settings in which two mappings differ, with both values; None stands for a missing one."""
    for key in own | other:
        a, b = own.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{where}{key}.")
        elif a != b:
            yield where + key, a, b
