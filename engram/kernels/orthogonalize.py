"""Newton-Schulz iteration towards the nearest orthogonal matrix, as Muon takes it (arXiv:2502.16982, section 2.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engram.kernels.library import define

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_STEPS = 5
_EPS = 1e-7
_FEW = 2**16  # numbers in a matrix that one thread is enough for


def orthogonalize_reference(updates: Tensor, coefficients: Sequence[float], steps: int) -> Tensor:
    """`orthogonalize` in plain torch."""
    a, b, c = coefficients
    x = updates.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(_EPS)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).contiguous()


_orthogonalize = define(
    "orthogonalize(Tensor updates, float[] coefficients, int steps) -> Tensor",
    orthogonalize_reference,
    lambda updates, coefficients, steps: updates.new_empty(updates.shape, dtype=torch.bfloat16),
)


def orthogonalize(updates: Tensor) -> Tensor:
    """Quintic Newton-Schulz iteration on each matrix of `[E, a, b]`, in bfloat16: singular values go to about 1."""
    E, a, b = updates.shape
    # The kernel takes a matrix a thread; a few large ones are better shared by the threads.
    one_each = torch.get_num_threads() <= E or a * b <= _FEW
    way = _orthogonalize if one_each else orthogonalize_reference
    return way(updates, _COEFFICIENTS, _STEPS)
