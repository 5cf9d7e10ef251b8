"""A model spread over processes trains as in one process, on every mesh: losses, gradient norms and parameters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from small_model import MODEL, build, optimizer_of, train, whole_parameters
from torch import Tensor
from world import World

from engram.config import ConfigError
from engram.parallel.config import ParallelConfig

WorldOf = Callable[[int], World]
# Small rates: AdamW turns rounding near 0 into whole steps, Muon iterates in bfloat16, and a token whose choice of
# experts hangs on the last bit makes a difference of 1e-4 at once.
ADAMW = {"matrix_optimizer": "adamw", "lr": 3e-4}
MUON = {"matrix_optimizer": "muon", "lr": 3e-4}
STEPS = 20


def legal_meshes(n: int) -> list[dict[str, Any]]:
    """Every mesh of n processes that is not refused."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    meshes = []
    for replicate, expert, table in product(divisors, repeat=3):
        mesh = {"replicate": replicate, "expert": expert, "table": table}
        try:
            ParallelConfig(**mesh).sizes(n)
        except ConfigError:
            continue
        meshes.append(mesh)
    return meshes


Trained = tuple[list[float], list[float], dict[str, Tensor]]


def trained(
    rank: int,
    n: int,
    mesh: dict[str, Any] | None,
    optim: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    changes: dict[str, Any] | None = None,
    steps: int = STEPS,
) -> Trained:
    """Losses, norms, and parameters of all ranks together."""
    model = build(mesh, dtype, changes)
    losses, norms = train(model, optimizer_of(model, **optim), range(steps), rank, n if mesh is not None else 1)
    return losses, norms, whole_parameters(model)


def spread(rank: int, n: int, mesh: dict[str, Any], *how: Any) -> Trained | None:
    result = trained(rank, n, mesh, *how)
    return result if rank == 0 else None


def assert_moved(alone: Trained, start: dict[str, Tensor], least: float) -> None:
    """By at least so much in the mean, or that all end in the same place says nothing."""
    for name, value in alone[2].items():
        assert (value - start[name]).abs().mean() > least, name


def assert_same(ours: Trained, alone: Trained, tolerance: float, parameters: float) -> None:
    """Losses to `tolerance`, norms to 30 times that, relative; parameters in the mean, to another tolerance: where a
    gradient is 0 but for rounding, Adam takes whole steps."""
    assert ours[0] == pytest.approx(alone[0], abs=tolerance, rel=0)
    assert ours[1] == pytest.approx(alone[1], rel=30 * tolerance)
    assert ours[2].keys() == alone[2].keys()
    for name, value in alone[2].items():
        assert (ours[2][name] - value).abs().mean() < parameters, name


def test_the_number_of_legal_meshes_is_known() -> None:
    """All divisors of 4 but those where groups of experts would not fit the rows of the mesh (none for powers of 2)."""
    assert len(legal_meshes(2)) == 8
    assert len(legal_meshes(4)) == 27


@pytest.mark.parametrize("optim", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("n", [2, 4])
def test_every_mesh_trains_as_one_process(world_of: WorldOf, n: int, optim: dict[str, Any]) -> None:
    # Muon's updates come in bfloat16 and stay further apart: there no choice of experts may hang on them.
    changes = {} if optim is ADAMW else {"experts": {**MODEL["experts"], "top_k": MODEL["experts"]["n_experts"]}}
    # AdamW's stay so close that after a few steps each parameter has moved by far more than may lie between them.
    steps, parameters, moved = (8, 1e-5, 4e-4) if optim is ADAMW else (STEPS, 1e-4, 5e-4)
    alone = trained(0, 1, None, optim, torch.float32, changes, steps)
    assert_moved(alone, whole_parameters(build(changes=changes)), moved)
    meshes = legal_meshes(n) if optim is ADAMW else [{}, {"expert": n}, {"replicate": 2, "table": 1}]
    for mesh in meshes:
        result = world_of(n).run(spread, mesh, optim, torch.float32, changes, steps)[0]
        assert result is not None
        assert_same(result, alone, 1e-5, parameters)


@pytest.mark.parametrize("mesh", [{}, {"expert": 2, "table": 2}, {"replicate": 2, "expert": 4, "table": 1}])
def test_in_float64_even_large_steps_are_the_same(world_of: WorldOf, mesh: dict[str, Any]) -> None:
    optim = {"matrix_optimizer": "adamw", "lr": 1e-2}
    alone = trained(0, 1, None, optim, torch.float64)
    assert alone[0][-1] < alone[0][0] - 0.3
    result = world_of(4).run(spread, mesh, optim, torch.float64)[0]
    assert result is not None
    assert_same(result, alone, 1e-9, 1e-9)
