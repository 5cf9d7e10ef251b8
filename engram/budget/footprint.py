"""How much memory a model takes in training, its tables counted apart from the rest.

Tables dwarf everything else and behave unlike it: their gradients cover the rows of one batch alone, and their rows can
live elsewhere (arXiv:2601.07372, section 2.5). So one number for both would say little.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram.budget.costs import costs, table_rows
from engram.config import ModelConfig, SecondMoment, require, require_one_of

_TYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Footprint:
    """Bytes of weights, of their gradients and of the optimiser's state."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three together."""
        return self.parameters + self.gradients + self.optimizer


def training_memory(
    config: ModelConfig,
    tokens: int,
    value_bytes: int = 4,
    moments: int = 2,
    *,
    table_first_moment: bool = True,
    table_second_moment: SecondMoment = "element",
) -> tuple[Footprint, Footprint]:
    """Bytes that training holds on one device, unsharded: of everything but the tables, and of the tables.

    Args:
        config: the model.
        tokens: tokens in a batch between two optimiser steps; they bound the rows that get a gradient.
        value_bytes: bytes of a dense weight, of its gradient and of each of its moments.
        moments: moments that the optimiser of the dense parameters holds (AdamW 2, Muon 1).
        table_first_moment: whether tables have first moments (not with `table_beta1` 0).
        table_second_moment: one for each `element` of a table, or for each `row`.

    Tables and their gradients have the bytes of `table_dtype`. Their optimiser is taken to be `RowAdam`, whose moments
    are float32 whatever the table's type, with a 4-byte step number for each row. The gradient holds a row and its
    8-byte index for each token and head, before tokens with the same row are merged. Frozen tables have neither
    gradient nor state. Activations are not counted.

    Raises:
        ConfigError: numbers below 0, or another second moment.
    """
    require_one_of("table_second_moment", table_second_moment, SecondMoment)
    for name, value in (("tokens", tokens), ("value_bytes", value_bytes), ("moments", moments)):
        require(value >= 0, name, value, "0 or more")
    total = sum(cost.total for cost in costs(config, 1).values())
    if config.memory is None or not config.has_memory:
        return _dense(total, value_bytes, moments), Footprint(0, 0, 0)
    memory = config.memory
    rows = table_rows(memory)
    values = sum(rows) * memory.row_width
    dense = _dense(total - values, value_bytes, moments)
    table_bytes = _TYPE_BYTES[memory.table_dtype]
    if memory.kind == "frozen_random":
        return dense, Footprint(values * table_bytes, 0, 0)
    lookups = tokens * len(rows) * len(memory.orders) * memory.n_heads
    gradients = lookups * (memory.row_width * table_bytes + 8)
    numbers = values * table_first_moment + (values if table_second_moment == "element" else sum(rows)) + sum(rows)
    return dense, Footprint(values * table_bytes, gradients, 4 * numbers)


def _dense(count: int, value_bytes: int, moments: int) -> Footprint:
    return Footprint(count * value_bytes, count * value_bytes, count * value_bytes * moments)
