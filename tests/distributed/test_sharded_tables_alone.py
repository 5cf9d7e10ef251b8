"""Tables spread over processes, everything else left to DistributedDataParallel: the same training as in one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_model import CPU, MODEL, batch_of, optimizer_of, whole_parameters
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from world import World

from engram.backbone import EngramLM, mean_loss
from engram.backbone.initialize import materialize
from engram.config import ModelConfig
from engram.parallel.apply import shard_tables
from engram.parallel.config import ParallelConfig
from engram.parallel.mesh import Mesh
from engram.training.optim import clip_gradients

WorldOf = Callable[[int], World]
# All experts for every token: what is compared are gradients, not choices.
CHANGES = {"experts": {**MODEL["experts"], "top_k": MODEL["experts"]["n_experts"]}}


class _WithLoss(nn.Module):
    def __init__(self, model: EngramLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        return mean_loss(self.model.run(ids, documents).hidden, self.model.head_weight, targets)


def trained(
    rank: int, n: int, table: int | None, optim: dict[str, Any], steps: int
) -> tuple[list[float], dict[str, Tensor]]:
    """Norms of gradients, and parameters: in this process alone, or with rows over groups of `table`."""
    with torch.device("meta"):
        model = EngramLM(ModelConfig.from_dict({**MODEL, **CHANGES})).double()
    to_train: nn.Module = _WithLoss(model)
    if table is not None:
        shard_tables(to_train, Mesh.of(ParallelConfig(table=table), "cpu"))
    materialize(model, CPU, 0)
    if table is not None:
        to_train = DistributedDataParallel(to_train)
    optimizer = optimizer_of(model, **optim)
    norms = []
    for step in range(steps):
        to_train(*batch_of(step).part(rank, n if table is not None else 1)).backward()
        norms.append(clip_gradients(to_train, 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, whole_parameters(model)


@pytest.mark.parametrize("table", [1, 2])
@pytest.mark.parametrize("matrix_optimizer", ["adamw", "muon"])
def test_training_with_ddp_is_that_of_one_process(world_of: WorldOf, table: int, matrix_optimizer: str) -> None:
    # Muon iterates in bfloat16, where the last bit of a sum makes a difference.
    steps, tolerance = (10, 1e-9) if matrix_optimizer == "adamw" else (3, 1e-4)
    optim = {"matrix_optimizer": matrix_optimizer, "lr": 1e-3}
    alone, ours = trained(0, 1, None, optim, steps), world_of(2).run(trained, table, optim, steps)
    for norms, parameters in ours:
        assert norms == pytest.approx(alone[0], rel=30 * tolerance)
        for name, value in alone[1].items():
            assert (parameters[name] - value).abs().max() < tolerance, name
