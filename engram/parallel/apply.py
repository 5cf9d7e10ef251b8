"""Apply a mesh to a finished model: tables and experts to their owners, the rest to FSDP2, one block at a time.

Or tables alone, in a model whose dense parameters a user's own loop looks after.

A model built on the meta device is made block by block, so that no process ever holds all of it, and starts as the same
model in one process would.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from engram.backbone import EngramLM
from engram.backbone.initialize import materialize
from engram.config import require
from engram.experts import MoE
from engram.memory.table import tables_in
from engram.parallel.config import MeshSizes
from engram.parallel.experts import ShardedExperts
from engram.parallel.mesh import Mesh
from engram.parallel.table import ShardedTable


def parallelize(model: EngramLM, mesh: Mesh, device: torch.device, seed: int = 0) -> EngramLM:
    """Spread a model over the processes of a mesh, in place; all of them must call this with the same model.

    Args:
        model: on any device, or on the meta device: then its weights are drawn from `seed`, by name.
        mesh: of `device`'s type.
        device: of this process.
        seed: for weights on the meta device.

    Returns:
        The model. Its parameters are this process's: rows of tables as plain tensors, everything else as DTensors of
        FSDP2 (experts that nobody else holds: plain tensors).

    Raises:
        ConfigError: a number of experts that the groups of `parallel.expert` can't share evenly.

    Warns where FSDP2 must cut experts over more processes than one has experts: it fills up to their number, and
    gathers the filling too.
    """
    sizes, names = mesh.sizes, {module: name for name, module in model.named_modules()}
    if model.config.experts is not None:
        n = model.config.experts.n_experts
        require(n % sizes.expert == 0, "parallel.expert", sizes.expert, f"a divisor of experts.n_experts ({n})")
        if n // sizes.expert < sizes.expert_shard:
            _warn_of_filling(n // sizes.expert, sizes)
    shard_tables(model, mesh)
    units: list[nn.Module] = [*_memories(model), *model.each_block()]
    for unit in units:
        materialize(unit, device, seed, names[unit])
        for module in [m for m in unit.modules() if isinstance(m, MoE)]:
            if sizes.expert > 1:
                module.experts = ShardedExperts(module.experts, mesh)
                if mesh.for_experts is not None:
                    fully_shard(module.experts, mesh=mesh.for_experts)
        _shard(unit, mesh)
        if hasattr(unit, "add_to"):
            register_fsdp_forward_method(unit, "add_to")
    materialize(model, device, seed)
    _shard(model, mesh)
    register_fsdp_forward_method(model, "run")
    return model


def _warn_of_filling(held: int, sizes: MeshSizes) -> None:
    times = sizes.expert_shard / held
    warnings.warn(
        f"FSDP2 cuts {held} experts of a layer over {sizes.expert_shard} processes, so that each gather of them is "
        f"{times:.1f} times as large as it need be: take a smaller parallel.shard or a larger parallel.expert",
        stacklevel=3,
    )


def shard_tables(model: nn.Module, mesh: Mesh) -> None:
    """Leave each process of a mesh its rows of every memory table in a model, in place, and nothing else changed.

    It is enough for a loop that wraps `model` in `DistributedDataParallel`, as `accelerate` does, which is told to pass
    tables by: NCCL can't sum row-sparse gradients. `model` must be the very module that is wrapped, and all processes
    must call this with the same one. Tables on the meta device can be drawn after it, by `materialize`, so that no
    process ever holds a whole one.
    """
    tables = tables_in(model)
    for _, owner, attribute, table in tables:
        setattr(owner, attribute, ShardedTable(table, mesh))
    names = [f"{name}.weight" for name, *_ in tables]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def _memories(model: EngramLM) -> list[nn.Module]:
    at_input = [] if model.input_memory is None else [model.input_memory]
    return [*at_input, *model.memory.values()]


def _shard(module: nn.Module, mesh: Mesh) -> None:
    """Let FSDP2 have what is not spread over processes already."""
    spread = {p for m in module.modules() if isinstance(m, ShardedTable | ShardedExperts) for p in m.parameters()}
    fully_shard(module, mesh=mesh.for_dense, ignored_params=spread)
