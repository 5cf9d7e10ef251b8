"""Several optimisers that step as one, so that a trainer sees a single optimiser with all their parameter groups."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from engram.training.optim.row_adam import RowAdam


class Together(torch.optim.Optimizer):
    """Steps each of its optimisers in turn. Its `param_groups` are theirs, so schedulers reach every group."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate `closure` once, then step every optimiser."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state of each optimiser, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, in memory of its own."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            # torch's optimisers keep the tensors they load, which may lie in a mapped file; ours of tables copies them.
            optimizer.load_state_dict(state if isinstance(optimizer, RowAdam) else copy.deepcopy(state))
        self._share_groups()
