"""A transformers model as a place for memory: its decoder, blocks and sizes, its tokenizer, and what identifies both.

Everything is found from what transformers promises of every model: `get_decoder`, `config`, `get_input_embeddings`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from engram.config import ConfigError, require
from engram.memory import TokenCompressor


@dataclass(frozen=True)
class Host:
    """The parts of a decoder-only model that memory has to do with.

    model: the transformers model, without what peft put around it. decoder: the module of it that runs the blocks.
    around: the one that calls it, None where the decoder is the model.
    """

    model: PreTrainedModel
    decoder: nn.Module
    around: nn.Module | None
    blocks: nn.ModuleList
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, model: nn.Module) -> Host:
        """Raises `ConfigError` for what is no decoder-only transformers model, or one whose blocks can't be told."""
        inner: Any = getattr(model, "get_base_model", lambda: model)()  # of a PeftModel
        require(isinstance(inner, PreTrainedModel), "model", type(inner).__name__, "a transformers PreTrainedModel")
        require(
            not inner.config.is_encoder_decoder, "model", type(inner).__name__, "a decoder-only model, without encoder"
        )
        decoder, config = inner.get_decoder(), inner.config.get_text_config()
        n = config.num_hidden_layers
        # What a few models name `decoder` is their head, and a few name nothing.
        if not _block_lists(decoder, n) and inner.can_generate():
            parts = [module for module in inner.modules() if isinstance(module, PreTrainedModel)]
            decoder = next((module for module in parts if _block_lists(module, n)), inner)
        found = _block_lists(decoder, n)
        require(
            len(found) == 1,
            f"number of block lists in {type(decoder).__name__}",
            len(found),
            f"one list, of {n} blocks (num_hidden_layers)",
        )
        around = next((module for module in inner.modules() if decoder in module.children()), None)
        size = inner.get_input_embeddings().weight.shape[0]
        return cls(inner, decoder, around, found[0], config.hidden_size, size)


def _block_lists(module: nn.Module, n: int) -> list[nn.ModuleList]:
    return [child for child in module.children() if isinstance(child, nn.ModuleList) and len(child) == n]


def find_tokenizer(host: Host, tokenizer: Any | None) -> Any:
    """The tokenizer given, or the one saved where the model was loaded from. Raises `ConfigError` if there is none."""
    if tokenizer is not None:
        return tokenizer
    name, way_out = host.model.config.name_or_path, "`tokenizer=`, or `compress=False` in the memory to hash raw ids"
    if not name:
        raise ConfigError(f"tokenizer is None, and the model was loaded from nowhere: give {way_out}")
    try:
        found = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library raises whatever its many loaders raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"tokenizer is None, and {name!r} holds none: give {way_out}; {reason}") from error
    if len(found) < host.vocab_size // 2:  # for some models the library makes one of special tokens from no files
        raise ConfigError(
            f"tokenizer is None, and the one of {name!r} has {len(found)} tokens, the model "
            f"{host.vocab_size}: give {way_out}"
        )
    return found


_NOT_OF_IDS = ("padding", "truncation", "post_processor")


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hex SHA-256 of what decides a tokenizer's ids. Padding, truncation and what is put around a text don't: calls and
    wrappers change them."""
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(fast, "to_str"):
        parts = json.loads(fast.to_str())
        text = json.dumps({name: part for name, part in parts.items() if name not in _NOT_OF_IDS})
    else:  # a tokenizer written in Python, or a list of tokens
        tokens = (
            fast.get_vocab().items() if hasattr(fast, "get_vocab") else ((token, i) for i, token in enumerate(fast))
        )
        text = json.dumps(sorted(tokens))
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Identity:
    """What an adapter asks of the model it was trained on. `tokenizer` and `compression` are fingerprints, empty where
    ids are hashed raw."""

    model: str
    hidden_size: int
    n_layers: int
    vocab_size: int
    tokenizer: str
    compression: str

    @classmethod
    def of(cls, host: Host, tokenizer: Any | None, compressor: TokenCompressor | None) -> Identity:
        return cls(
            type(host.model).__name__,
            host.hidden_size,
            len(host.blocks),
            host.vocab_size,
            "" if compressor is None else tokenizer_sha256(tokenizer),
            "" if compressor is None else compressor.fingerprint,
        )

    def require_same(self, saved: dict[str, Any]) -> None:
        """Raise `ConfigError`, naming what differs, unless an adapter was trained on such a model."""
        for name, own in asdict(self).items():
            require(saved.get(name) == own, f"base model's {name}", own, f"{saved.get(name)!r}, as the adapter's")
