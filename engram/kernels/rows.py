"""Rows of a table: read; their gradients, duplicates combined; and moved by Adam (arXiv:1412.6980)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.kernels.library import define
from engram.kernels.random import random_bits
from engram.tensors import widen

_MASK = 0xFFFFFFFF


def gather_rows_reference(table: Tensor, rows: Tensor) -> Tensor:
    """`gather_rows` in plain torch."""
    return F.embedding(rows, table)


_gather_rows = define(
    "gather_rows(Tensor table, Tensor rows) -> Tensor",
    gather_rows_reference,
    lambda table, rows: table.new_empty(*rows.shape, table.shape[1]),
)


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows `[...]` (int64) of a table `[R, W]`, `[..., W]`. Not differentiable.

    Raises IndexError beyond the table on the CPU; on a CUDA device an assertion fails, which ends all work there.
    """
    return _gather_rows(table, rows)


def combine_rows_reference(rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """`combine_rows` in plain torch."""
    unique, place = rows.unique(return_inverse=True)
    sums = widen(grads).new_zeros(len(unique), grads.shape[1]).index_add_(0, place, widen(grads))
    return unique, sums.to(grads.dtype)


def _combine_rows_fake(rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.library.get_ctx().new_dynamic_size()
    return rows.new_empty(n), grads.new_empty(n, grads.shape[1])


_combine_rows = define(
    "combine_rows(Tensor rows, Tensor grads) -> (Tensor, Tensor)", combine_rows_reference, _combine_rows_fake
)


def combine_rows(rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """Row indices `[n]` with repeats and their gradients `[n, W]` -> each row once, ascending, `[u]`, and its sum.

    Sums are taken in float32 (float64 for float64), in the order in which a row's gradients came.
    """
    return _combine_rows(rows, grads)


def round_at_random(x: Tensor, random: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down in proportion to what is cut off; `random` holds 16 or more bits for each."""
    bits = x.view(torch.int32).long() & _MASK
    up = torch.where(x.isfinite(), bits + (random & 0xFFFF), bits) & 0xFFFF0000
    rounded = torch.where(up >= 2**31, up - 2**32, up).to(torch.int32).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).bfloat16()


def row_adam_reference_(
    table: Tensor,
    row_state: Tensor,
    rows: Tensor,
    grads: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    seed: int,
) -> None:
    """`row_adam_` in plain torch."""
    g = widen(grads)
    firsts = table.shape[1] if beta1 else 0
    first, second, last = row_state[rows].tensor_split([firsts, row_state.shape[1] - 1], dim=1)
    missed = step - last
    first = first * beta1**missed + (1 - beta1) * g if beta1 else first
    square = g.square() if second.shape[1] == g.shape[1] else g.square().mean(1, keepdim=True)
    second = second * beta2**missed + (1 - beta2) * square
    row_state[rows] = torch.cat([first, second, torch.full_like(last, step)], dim=1)
    root = (second / (1 - beta2**step)).sqrt() + eps
    moved = widen(table[rows]) - lr / (1 - beta1**step) * (first if beta1 else g) / root
    if table.dtype == torch.bfloat16:
        table[rows] = round_at_random(moved, random_bits(rows, table.shape[1], seed, step))
    else:
        table[rows] = moved.to(table.dtype)


_row_adam_ = define(
    "row_adam_(Tensor(a!) table, Tensor(b!) row_state, Tensor rows, Tensor grads, int step, float lr, float beta1, "
    "float beta2, float eps, int seed) -> ()",
    row_adam_reference_,
    lambda *args: None,
)


def row_adam_(
    table: Tensor,
    row_state: Tensor,
    rows: Tensor,
    grads: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    seed: int,
) -> None:
    """One step of Adam on some rows of a table `[R, W]`, in place; nothing else is read or written.

    Moments are decayed by the steps since a row's last one, and computed in float32 (float64 for a float64 table). A
    bfloat16 table is rounded at random, by bits that depend on seed, step, row and column alone.

    Args:
        row_state: what is kept of a row side by side, `[R, S]`: W first moments (none if `beta1` is 0); W second
            moments, or one, of the row's mean squared gradient; the step at which it was last moved.
        rows, grads: the rows to move, each once, `[u]`, and their gradients `[u, W]`.
        step: this step's number, from 1.
    """
    _row_adam_(table, row_state, rows, grads, step, lr, beta1, beta2, eps, seed)
