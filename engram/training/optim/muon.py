"""Muon for many small matrices: those of one shape, and the E of a stack of experts, are orthogonalised together.

The rule is that of `torch.optim.Muon` (scaling of arXiv:2502.16982), which takes one 2-D weight at a time; tests
compare the two matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from engram.config import require
from engram.kernels import load_kernels, orthogonalize
from engram.parallel.local import local_part

_TOGETHER = 2**22  # numbers in a batch of matrices, which is a copy: beyond that nothing is won by batching


class BatchedMuon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, on `[a, b]` and `[E, a, b]` weights, matrix by matrix.

    The learning rate is scaled by 0.2 sqrt(max(a, b)), so that an update's root mean square is that of Adam's and both
    can share one learning rate (`match_rms_adamw` of torch).
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        require(lr >= 0, "lr", lr, "0 or more")
        require(0 <= momentum < 1, "momentum", momentum, "0 to below 1")
        require(weight_decay >= 0, "weight_decay", weight_decay, "0 or more")
        load_kernels()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weights in self._rounds([p for p in group["params"] if p.grad is not None]):
                self._move(weights, group)
        return loss

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        gradients = [local_part(weight.grad) for weight in weights if weight.grad is not None]
        averages = [local_part(self.state[weight]["momentum_buffer"]) for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = self._orthogonalized(weights, torch._foreach_lerp(gradients, averages, momentum))
        torch._foreach_mul_(updates, [-lr * 0.2 * max(weight.shape[-2:]) ** 0.5 for weight in weights])
        own = [local_part(weight) for weight in weights]
        torch._foreach_mul_(own, 1 - lr * group["weight_decay"])
        torch._foreach_add_(own, updates)

    def _rounds(self, weights: list[Tensor]) -> list[list[Tensor]]:
        """The weights that are moved at a time."""
        return batches(weights)

    def _orthogonalized(self, weights: list[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
        """The updates of weights moved at a time, orthogonalised, in their weights' type."""
        return orthogonalized(updates)


def orthogonalized(updates: Sequence[Tensor]) -> list[Tensor]:
    """Of one stack of matrices, or of matrices of one shape, each orthogonalised."""
    if updates[0].ndim == 3:
        return [orthogonalize(updates[0]).to(updates[0].dtype)]
    return list(orthogonalize(torch.stack(list(updates))).to(updates[0].dtype).unbind())


def batches(weights: Sequence[Tensor]) -> list[list[Tensor]]:
    """Matrices of one shape in batches of up to `_TOGETHER` numbers; stacks each on their own."""
    result: list[list[Tensor]] = []
    open_batch: dict[Any, list[Tensor]] = {}
    for weight in weights:
        kind = (weight.shape, weight.dtype, weight.device)
        batch = open_batch.get(kind)
        if weight.ndim == 3 or batch is None or (len(batch) + 1) * weight.numel() > _TOGETHER:
            batch = []
            result.append(batch)
            open_batch[kind] = batch
        batch.append(weight)
    return result
