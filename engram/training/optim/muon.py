"""Muon for many small matrices: those of one shape, and the E of a stack of experts, are orthogonalised together.

The rule is that of `torch.optim.Muon` (scaling of arXiv:2502.16982), which takes one 2-D weight at a time; tests
compare the two matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from engram.config import require
from engram.kernels import load_kernels, orthogonalize

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
            for weights in _batches([p for p in group["params"] if p.grad is not None]):
                self._move(weights, group)
        return loss

    def _move(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        averages = [self.state[weight]["momentum_buffer"] for weight in weights]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, averages, momentum)
        stacked = updates[0] if weights[0].ndim == 3 else torch.stack(updates)
        moved = orthogonalize(stacked).to(weights[0].dtype)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        steps = [moved] if weights[0].ndim == 3 else list(moved.unbind())
        torch._foreach_add_(weights, steps, alpha=-lr * 0.2 * max(weights[0].shape[-2:]) ** 0.5)


def _batches(weights: list[Tensor]) -> list[list[Tensor]]:
    """Matrices of one shape in batches of up to `_TOGETHER` numbers; stacks each on their own."""
    batches: list[list[Tensor]] = []
    open_batch: dict[Any, list[Tensor]] = {}
    for weight in weights:
        kind = (weight.shape, weight.dtype, weight.device)
        batch = open_batch.get(kind)
        if weight.ndim == 3 or batch is None or (len(batch) + 1) * weight.numel() > _TOGETHER:
            batch = []
            batches.append(batch)
            open_batch[kind] = batch
        batch.append(weight)
    return batches
