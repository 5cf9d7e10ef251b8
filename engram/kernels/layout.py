"""Rows ordered by expert for a grouped product: where each token's copies go, by counting (no sort on the CPU)."""

from __future__ import annotations

import torch
from torch import Tensor

from engram.kernels.library import define


def lay_out_reference(experts: Tensor, load: Tensor, multiple: int, worst: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`lay_out_rows` in plain torch."""
    (N, K), E = experts.shape, len(load)
    expert_of_copy = experts.flatten()
    copies = expert_of_copy.argsort(stable=True)
    padded = (load + multiple - 1) // multiple * multiple
    ends = padded.cumsum(0)
    padding_before = (ends - padded) - (load.cumsum(0) - load)
    rows = torch.arange(N * K, device=copies.device) + padding_before[expert_of_copy[copies]]
    place = torch.empty_like(copies).scatter(0, copies, rows)
    P = room_for(N * K, E, multiple) if worst else int(ends[-1])
    copy = torch.full((P,), N * K, device=copies.device).scatter(0, rows, copies)
    return place.view(N, K), copy, ends


def room_for(copies: int, E: int, multiple: int) -> int:
    """Rows that any choice of experts could need."""
    return (copies + E * (multiple - 1)) // multiple * multiple


def _fake(experts: Tensor, load: Tensor, multiple: int, worst: bool) -> tuple[Tensor, Tensor, Tensor]:
    P = room_for(experts.numel(), len(load), multiple) if worst else torch.library.get_ctx().new_dynamic_size()
    return experts.new_empty(experts.shape), experts.new_empty(P), load.new_empty(load.shape)


_op = define(
    "lay_out_rows(Tensor experts, Tensor load, int multiple, bool worst) -> (Tensor, Tensor, Tensor)",
    lay_out_reference,
    _fake,
)


def lay_out_rows(experts: Tensor, load: Tensor, multiple: int, worst: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Places of each token's copies among P rows ordered by expert, then by token, each group padded.

    Args:
        experts: of each token, `[N, K]`, int64. load: how many copies each expert has, `[E]`.
        multiple: to which groups are padded.
        worst: whether P is what any choice of experts could need, so that no shape depends on data, or what these need.

    Returns:
        The row of each copy `[N, K]`; the copy `n * K + k` in each row, N * K in padding, `[P]`; the end of each
        expert's rows `[E]`, after which all rows are padding.
    """
    return _op(experts, load, multiple, worst)
