"""The operator `hash_gather`: `hash_ngrams` (arXiv:2601.07372, section 2.2), and the rows of a table that it finds.

Its kernel for CUDA, in hashing.py, does both in one pass; the reference here needs no Triton.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.kernels import hashing  # noqa: F401 -- defines hash_ngrams
from engram.kernels.library import define


def hash_gather_reference(
    ids: Tensor,
    documents: Tensor | None,
    moduli: Tensor,
    offsets: Tensor,
    multipliers: list[int],
    orders: list[int],
    past: int,
    pad_id: int,
    eos_id: int,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    """Rows `[B, T, H]` as `hash_ngrams` gives them and what the `[R, W]` table holds there, `[B, T, H, W]`."""
    hash_ngrams = torch.ops.engram.hash_ngrams.default
    rows = hash_ngrams(ids, documents, moduli, offsets, multipliers, orders, past, pad_id, eos_id)
    return rows, F.embedding(rows, table)


def _fake(
    ids: Tensor,
    documents: Tensor | None,
    moduli: Tensor,
    offsets: Tensor,
    multipliers: list[int],
    orders: list[int],
    past: int,
    pad_id: int,
    eos_id: int,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    shape = (ids.shape[0], ids.shape[1] - past, len(moduli))
    return ids.new_empty(shape), table.new_empty(*shape, table.shape[1])


# Not differentiable: a table's gradient is row-sparse, and how it gets there is the table's affair.
hash_gather = define(
    "hash_gather(Tensor ids, Tensor? documents, Tensor moduli, Tensor offsets, int[] multipliers, int[] orders, "
    "int past, int pad_id, int eos_id, Tensor table) -> (Tensor, Tensor)",
    hash_gather_reference,
    _fake,
)
