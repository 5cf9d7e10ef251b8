"""Which experts go together: for how many tokens two are chosen, beside what their loads alone would give."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def pairs_chosen(experts: NDArray[Any], n_experts: int) -> Ints:
    """How many tokens, of choices `[N, K]`, went to both of two experts `[E, E]`; zero on the diagonal."""
    i, j = np.triu_indices(experts.shape[1], 1)
    pairs = experts[:, i].astype(np.int64) * n_experts + experts[:, j]
    counts = np.bincount(pairs.ravel(), minlength=n_experts**2).reshape(n_experts, n_experts)
    return counts + counts.T


def pairs_by_load(load: Ints, top_k: int) -> Floats:
    """How many tokens would go to both of two experts `[E, E]`, did they not attract or repel each other.

    Quasi-independence (Goodman 1968): in proportion to a factor of each expert, zero on the diagonal as no token takes
    one twice, and as many pairs of each expert as there are. For K = 2 it is what drawing two different ones gives.
    """
    pairs = load * (top_k - 1.0)
    factor = pairs / max(np.sqrt(pairs.sum()), 1)
    for _ in range(1000):
        others = factor.sum() - factor
        wanted = np.divide(pairs, others, out=np.zeros_like(pairs), where=others > 0)
        moved = np.sqrt(factor * wanted)  # half of the way, or it would go to and fro
        done = np.allclose(moved, factor, rtol=1e-12, atol=0)
        factor = moved
        if done:
            break
    expected = np.outer(factor, factor)
    np.fill_diagonal(expected, 0)
    return expected
