"""Which optimiser moves which parameter: tables by RowAdam, matrices by AdamW or Muon, the rest by AdamW.

The split and the tables' five-fold learning rate without weight decay are those of arXiv:2601.07372, section 4.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engram.backbone import EngramLM
from engram.config import SecondMoment, require, require_one_of
from engram.parallel.local import copies_of, is_spread, local_part
from engram.tensors import widen
from engram.training.optim.muon import BatchedMuon
from engram.training.optim.roles import Roles
from engram.training.optim.row_adam import RowAdam, coalesced
from engram.training.optim.sharded_muon import ShardedMuon
from engram.training.optim.together import Together
from engram.training.schedule import ScheduleConfig

__all__ = ["BatchedMuon", "OptimConfig", "Roles", "RowAdam", "Together", "build_optimizer", "clip_gradients"]

MatrixOptimizer = Literal["adamw", "muon"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser settings of a run.

    `lr` is the peak of everything but tables, which get `lr * table_lr_factor`; Muon's is scaled to Adam's update size,
    so both matrix optimisers read it alike, but Muon stands two to three times more of it. `weight_decay` goes to
    matrices and embeddings alone. `clip` bounds the global gradient norm (0: no bound). `table_schedule` None: the
    tables follow `schedule`.

    Tables are most of a model that has them, and so is their optimiser's state. `table_beta1` 0 keeps no first moments
    of them (None: `beta1`, as for the rest), `table_second_moment` row one number for each row in the place of one for
    each element; what each is worth: `benchmarks/table_optimizers.py`.
    """

    lr: float = 3e-3
    matrix_optimizer: MatrixOptimizer = "muon"
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    table_lr_factor: float = 5.0
    table_beta1: float | None = None
    table_second_moment: SecondMoment = "element"
    clip: float = 1.0
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    table_schedule: ScheduleConfig | None = None

    def __post_init__(self) -> None:
        require_one_of("optim.matrix_optimizer", self.matrix_optimizer, MatrixOptimizer)
        require_one_of("optim.table_second_moment", self.table_second_moment, SecondMoment)
        for name in ("lr", "eps"):
            require(0 < getattr(self, name) < math.inf, f"optim.{name}", getattr(self, name), "above 0, finite")
        for name in ("weight_decay", "table_lr_factor", "clip"):
            require(0 <= getattr(self, name) < math.inf, f"optim.{name}", getattr(self, name), "0 or more, finite")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "0 to below 1")
        own = self.table_beta1
        require(own is None or 0 <= own < 1, "optim.table_beta1", own, "0 to below 1, or none for beta1")


def build_optimizer(model: EngramLM, config: OptimConfig) -> Together:
    """One optimiser over all trainable parameters. Each group says by `name` what it holds, and by `schedule` which
    schedule of the config it follows."""
    roles = Roles.of(model)
    # An embedding is a list of vectors and no linear map, so Muon's orthogonal updates have no meaning for it.
    maps = {"matrices": roles.matrices, "experts": roles.stacks}
    decayed = {"embeddings": roles.embeddings} | (maps if config.matrix_optimizer == "adamw" else {})
    groups = [_group(name, parameters, weight_decay=config.weight_decay) for name, parameters in decayed.items()]
    groups.append(_group("vectors", roles.vectors, weight_decay=0.0))
    betas = (config.beta1, config.beta2)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=betas, eps=config.eps, fused=True)
    ]
    if config.matrix_optimizer == "muon":
        muon = [_group(name, parameters) for name, parameters in maps.items() if parameters]
        if muon:
            kind = ShardedMuon if is_spread(model) else BatchedMuon
            optimizers.append(kind(muon, config.lr, config.weight_decay))
    if roles.tables:
        tables = [_group("tables", roles.tables, schedule="table_schedule")]
        lr = config.lr * config.table_lr_factor
        table_betas = (config.beta1 if config.table_beta1 is None else config.table_beta1, config.beta2)
        optimizers.append(RowAdam(tables, lr, table_betas, config.eps, config.table_second_moment))
    return Together(optimizers)


def _group(name: str, params: list[nn.Parameter], schedule: str = "schedule", **options: float) -> dict[str, Any]:
    return {"params": params, "name": name, "schedule": schedule, **options}


@torch.no_grad()
def clip_gradients(model: nn.Module, bound: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `bound` (0: leave them); returns the norm before.

    Row-sparse gradients are coalesced, counted by the rows they hold, and stay sparse. Of a model that is spread over
    processes everything is counted once, however many hold it; all of them must call this.
    """
    copies = copies_of(model)
    gradients: dict[tuple[int, torch.dtype], list[Tensor]] = {}  # lists of one type are scaled in one pass
    for p in model.parameters():
        if p.grad is not None:
            if p.grad.is_sparse:
                p.grad = coalesced(p.grad)
            values = p.grad.values() if p.grad.is_sparse else local_part(p.grad)
            gradients.setdefault((copies[p], values.dtype), []).append(values)
    norms = {kind: torch.nn.utils.get_total_norm(list(map(widen, some))) for kind, some in gradients.items()}
    total = sum((norm.square() / n for (n, _), norm in norms.items()), torch.zeros((), device=_device_of(model)))
    if is_spread(model):
        dist.all_reduce(total)
    norm = total.sqrt()
    if bound:
        for some in gradients.values():
            torch._foreach_mul_(some, (bound / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
