"""The operator `hash_gather`: `hash_ngrams` (arXiv:2601.07372, section 2.2), and the rows of a table that it finds.

Its kernel for CUDA, in hashing.py, does both in one pass; the reference here needs no Triton.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engram.kernels import gather_rows
from engram.kernels.library import define


def hash_gather_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Rows `[B, T, H]` as `hash_ngrams` gives them and what the `[R, W]` table holds there, `[B, T, H, W]`.

    The arguments are those of `hash_ngrams`, then the table.
    """
    *to_hash, table = arguments
    rows = torch.ops.engram.hash_ngrams.default(*to_hash)
    return rows, gather_rows(table, rows)


# Not differentiable: a table's gradient is row-sparse, and how it gets there is the table's affair.
hash_gather = define(
    "hash_gather(Tensor ids, Tensor? documents, Tensor moduli, Tensor offsets, int ordinal, int[] multipliers, "
    "int[] orders, int past, int pad_id, int eos_id, int n_ids, Tensor table) -> (Tensor, Tensor)",
    hash_gather_reference,
    hash_gather_reference,  # what it calls knows the shapes
)
