"""What a model was trained with: which tokenizer, in a form that can be compared, and what goes with saved weights so
that they are never read by another hash, seed or compression than wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from engram.config import ConfigError, ModelConfig
from engram.memory import TokenCompressor


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
    try:
        saved = json.loads(origin)
        trained = ModelConfig.from_dict(saved["config"])  # by itself, so that settings newer than the file have a value
        compression, digest = str(saved["compression"]), str(saved["tokenizer"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"what the weights tell of their origin is damaged: {type(error).__name__} {error}"
        ) from error
    wrong = [
        f"{name} is {own!r}: the weights were trained with {other!r}"
        for name, own, other in _differences(config.to_dict(), trained.to_dict())
    ]
    found = {"token compression": (_compression(lookup), compression)}
    if digest:
        found |= {name: (_digest(tokenizer.to_str()), digest) for name, tokenizer in tokenizers.items()}
    wrong += [
        f"{name} has {_shown(own)}: the weights were trained with {_shown(other)}"
        for name, (own, other) in found.items()
        if own != other
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))


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
