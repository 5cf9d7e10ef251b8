"""A trained model at positions beyond those it was trained on, by YaRN (arXiv:2309.00071) and without training."""

from __future__ import annotations

import copy
import dataclasses
import math

from engram.backbone.model import EngramLM
from engram.config import YarnConfig, require


def extend_context(model: EngramLM, factor: float, trained_seq_len: int | None = None) -> EngramLM:
    """The model with positions that reach `factor` times as far; it shares all parts and weights with `model`, which
    stays as it is.

    `trained_seq_len`: the length that positions were trained on, `max_seq_len` of the config if None; a model that was
    trained with YaRN knows it, and its own factor is multiplied. Raises `ConfigError` for a factor below 1 or beyond
    all numbers, with that of the model or by itself; a length below 1; and a model whose channels all turn alike.
    """
    config = model.config
    require(1 <= factor < math.inf, "factor", factor, "a finite number, 1 or more")
    own = config.attention.yarn
    if own is None:
        length = config.max_seq_len if trained_seq_len is None else trained_seq_len
        require(length >= 1, "trained_seq_len", length, "1 or more")
        yarn = YarnConfig(factor=factor, original_max_seq_len=length)
    else:
        finite = own.factor * factor < math.inf
        require(finite, "factor", factor, f"one whose product with the model's own, {own.factor}, is finite")
        yarn = dataclasses.replace(own, factor=own.factor * factor)
    extended = copy.copy(model)
    extended.config = dataclasses.replace(
        config,
        attention=dataclasses.replace(config.attention, yarn=yarn),
        max_seq_len=max(config.max_seq_len, math.floor(yarn.factor * yarn.original_max_seq_len)),
    )
    return extended
