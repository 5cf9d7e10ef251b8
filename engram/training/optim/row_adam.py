"""Adam for memory tables: only rows that were read are touched, whatever the table's size.

Adam is arXiv:1412.6980; one second moment for a whole row is the choice of row-wise AdaGrad and Adam in recommender
systems (arXiv:1906.00091, section 3) and of the nanochat speed runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from engram.config import SecondMoment, require, require_one_of
from engram.kernels import combine_rows, load_kernels, row_adam_


def coalesced(grad: Tensor) -> Tensor:
    """A row-sparse gradient with each row once, its duplicates summed: `grad.coalesce()` in a fraction of the time."""
    if grad.is_coalesced():
        return grad
    rows, sums = combine_rows(grad._indices()[0], grad._values())
    return torch.sparse_coo_tensor(rows.unsqueeze(0), sums, grad.shape, is_coalesced=True, check_invariants=False)


class RowAdam(torch.optim.Optimizer):
    """Adam on row-sparse (COO) gradients of `[rows, width]` tables, duplicates of a row summed first. No weight decay.

    Moments of a row that was not read are decayed when it is read next, by the steps it missed, so that they are those
    of dense Adam. What differs from dense Adam: a row that is not read stays where it is, where dense Adam would go on
    moving it by its old momentum; the loss of a small run was the same within 0.01 nats (docs/method.md).
    (`torch.optim.SparseAdam` differs more: it does not decay what it does not see.)

    State of a table of R rows: `row_state` `[R, S]`, what is kept of a row side by side, since each place in memory
    costs time: first moments (`width` of them; none with `betas[0]` 0), second moments (`width`, or one), and the step
    at which it was last moved (exact up to 2^24). All in float32, or float64 for a float64 table. A bfloat16 table is
    rounded at random (stochastic rounding), so that updates too small for its 8 bits add up; the random bits depend on
    `seed`, step and place alone.

    Args:
        params: tables, or groups of them.
        lr: learning rate. betas, eps: as in Adam.
        second_moment: one for each `element`, or one for each `row`: the mean of its squared gradients.
        seed: of the random rounding.

    Raises:
        ConfigError: settings out of range. TypeError: a dense gradient, which would mean work on the whole table.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        second_moment: SecondMoment = "element",
        seed: int = 0,
    ) -> None:
        require(lr >= 0, "lr", lr, "0 or more")
        require(all(0 <= b < 1 for b in betas), "betas", betas, "two numbers from 0 to below 1")
        require(eps > 0, "eps", eps, "above 0")
        require_one_of("second_moment", second_moment, SecondMoment)
        load_kernels()
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "second_moment": second_moment, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every table that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for number, table in enumerate(group["params"]):
                if table.grad is not None:
                    self._update(table, group, group["seed"] + number)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, copied tensor by tensor."""
        # The base class would make all of the table's type, which may be narrower, and step numbers are whole.
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        tables = [table for group in self.param_groups for table in group["params"]]
        for number, table in zip(numbers, tables, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[table][name] = value.to(table.device, copy=True) if isinstance(value, Tensor) else value

    def _update(self, table: Tensor, group: dict[str, Any], seed: int) -> None:
        grad = table.grad
        if grad is None or not grad.is_sparse:
            raise TypeError("RowAdam needs row-sparse gradients (torch.sparse_coo); got a dense one")
        beta1, beta2 = group["betas"]
        state = self.state[table]
        if not state:
            wide = torch.promote_types(table.dtype, torch.float32)
            (R, W), by_row = table.shape, group["second_moment"] == "row"
            state["step"] = 0
            kept = (W if beta1 else 0) + (1 if by_row else W) + 1
            state["row_state"] = table.new_zeros(R, kept, dtype=wide)
        state["step"] += 1
        grad = coalesced(grad)
        row_adam_(
            table,
            state["row_state"],
            grad.indices()[0],
            grad.values(),
            step=state["step"],
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            seed=seed,
        )
