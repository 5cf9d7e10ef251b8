"""Softmax cross-entropy of a chunk of logits, which turns them into their own gradient in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from engram.kernels.library import define
from engram.tensors import widen


def cross_entropy_reference_(logits: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy_` in plain torch."""
    wide, index = widen(logits), targets.unsqueeze(1)
    log_sum = wide.logsumexp(1, keepdim=True)
    losses = (log_sum - wide.gather(1, index)).squeeze(1)
    p = (wide - log_sum).exp()
    logits.copy_(p.scatter_add(1, index, p.new_full((), -1.0).expand_as(index)))
    return losses


_op = define(
    "cross_entropy_(Tensor(a!) logits, Tensor targets) -> Tensor",
    cross_entropy_reference_,
    lambda logits, targets: logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32)),
)


def cross_entropy_(logits: Tensor, targets: Tensor) -> Tensor:
    """Turn logits `[N, V]` into softmax - onehot(target) in place; returns the losses in nats, `[N]`.

    Computed in float32 (float64 for float64). Targets: int64 `[N]`, below V.
    """
    return _op(logits, targets)
