"""Suffix N-grams -> table rows: multiply, XOR, reduce modulo each head's prime (arXiv:2601.07372, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engram.kernels.library import define
from engram.tensors import require_ids


def hash_ngrams_reference(
    ids: Tensor,
    documents: Tensor | None,
    moduli: Tensor,
    offsets: Tensor,
    ordinal: int,
    multipliers: list[int],
    orders: list[int],
    past: int,
    pad_id: int,
    eos_id: int,
    n_ids: int,
) -> Tensor:
    """`hash_ngrams` in plain torch."""
    require_ids(ids, n_ids)
    T = ids.shape[1] - past
    context = max(orders) - 1
    # Before the sequence: the pad id, in no document that a token could be in.
    ids = torch.nn.functional.pad(ids, (context, 0), value=pad_id)
    documents = torch.zeros_like(ids[:, context:]) if documents is None else documents
    none = int(torch.iinfo(torch.int64).min)
    starts = [torch.nn.functional.pad(documents, (context, 0), value=none)]
    if eos_id >= 0:
        at_eos = (ids == eos_id).long()
        at_eos[:, :context] = 0
        starts.append(at_eos.cumsum(1) - at_eos)
    now = slice(context + past, None)
    mix = ids[:, now] * multipliers[0]
    same = torch.ones_like(mix, dtype=torch.bool)
    mixes = [mix] if 1 in orders else []
    for back in range(1, context + 1):
        then = slice(context + past - back, context + past - back + T)
        for start in starts:
            same = same & (start[:, then] == start[:, now])
        mix = mix ^ (torch.where(same, ids[:, then], pad_id) * multipliers[back])
        if back + 1 in orders:
            mixes.append(mix)
    heads = moduli.shape[1] // len(orders)
    return torch.stack(mixes, dim=-1).repeat_interleave(heads, dim=-1) % moduli[ordinal] + offsets[ordinal]


def _fake(ids: Tensor, documents: Tensor | None, moduli: Tensor, *settings: Any) -> Tensor:
    past = settings[4]  # after offsets, ordinal, multipliers and orders
    return ids.new_empty(ids.shape[0], ids.shape[1] - past, moduli.shape[1])


_op = define(
    "hash_ngrams(Tensor ids, Tensor? documents, Tensor moduli, Tensor offsets, int ordinal, int[] multipliers, "
    "int[] orders, int past, int pad_id, int eos_id, int n_ids) -> Tensor",
    hash_ngrams_reference,
    _fake,
)


def hash_ngrams(
    ids: Tensor,
    documents: Tensor | None,
    moduli: Tensor,
    offsets: Tensor,
    *,
    ordinal: int,
    multipliers: tuple[int, ...],
    orders: tuple[int, ...],
    past: int,
    pad_id: int,
    eos_id: int,
    n_ids: int,
) -> Tensor:
    """Rows `[B, T, H]` that the last T of the ids `[B, past + T]` read, all int64.

    Args:
        ids, documents: `[B, past + T]`; an N-gram stops where the document changes (None: all are one document).
        moduli, offsets: `[L, H]` of L layers, by order, then by head; rows are `mix mod modulus + offset`.
        ordinal: whose of them, 0 .. L - 1 (all are passed on, since to index them takes as long as to hash a token).
        multipliers: one for each position of an N-gram, the token itself first.
        orders: ascending.
        past: how many of the ids only serve as context.
        pad_id: stands for what lies before the start of the row or of the document.
        eos_id: an id after which a new document starts, or -1 for none.
        n_ids: ids lie in 0 .. n_ids - 1.

    Raises:
        ValueError: on the CPU, an id that does not: elsewhere a look at the values would make the host wait.
    """
    return _op(ids, documents, moduli, offsets, ordinal, multipliers, orders, past, pad_id, eos_id, n_ids)
