"""A small model with all kinds of parameters, and its training, in one process or spread over several."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from engram.backbone import EngramLM, mean_loss
from engram.backbone.initialize import materialize
from engram.config import ModelConfig
from engram.parallel.apply import parallelize
from engram.parallel.config import ParallelConfig
from engram.parallel.experts import ShardedExperts
from engram.parallel.mesh import Mesh
from engram.parallel.prefetch import Prefetch
from engram.parallel.table import ShardedTable
from engram.training.optim import OptimConfig, Together, build_optimizer, clip_gradients

MODEL: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "n_layers": 2,
    "dense_width": 48,
    "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
    "experts": {"n_experts": 8, "top_k": 3, "width": 16, "shared_width": 16, "bias_step": 1e-3},
    "memory": {"layers": [0, 1], "n_heads": 2, "row_width": 4, "rows": [50, 50], "compress": False},
}
B, T = 8, 16
CPU = torch.device("cpu")


class Batch(NamedTuple):
    ids: Tensor
    targets: Tensor
    documents: Tensor

    def part(self, rank: int, n: int) -> Batch:
        """The rows of a rank."""
        each = B // n
        return Batch(*(x[rank * each : (rank + 1) * each] for x in self))


def batch_of(step: int) -> Batch:
    """Ids by Zipf's law, in documents of ten tokens on average."""
    generator = torch.Generator().manual_seed(step)
    weights = 1 / torch.arange(1.0, MODEL["vocab_size"] + 1)
    ids = torch.multinomial(weights, B * (T + 1), replacement=True, generator=generator).view(B, T + 1)
    return Batch(ids[:, :-1], ids[:, 1:], (torch.rand(B, T, generator=generator) < 0.1).cumsum(1))


def build(
    mesh: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, changes: dict[str, Any] | None = None
) -> EngramLM:
    """The model in this process alone, or its part with `mesh`."""
    settings = {**MODEL, **(changes or {})}
    with torch.device("meta"):
        model = EngramLM(ModelConfig.from_dict(settings)).to(dtype)
    if mesh is None:
        materialize(model, CPU, 0)
        return model
    return parallelize(model, mesh_of(**mesh), CPU, 0)


@functools.cache
def mesh_of(**sizes: Any) -> Mesh:
    """One for each shape: gloo never gives back the threads of its groups."""
    return Mesh.of(ParallelConfig(**sizes), "cpu")


class Losses(NamedTuple):
    """Mean loss over all ranks, and norm of the gradients, by step."""

    loss: list[float]
    norm: list[float]


def train(
    model: EngramLM,
    optimizer: Together,
    steps: range,
    rank: int = 0,
    n: int = 1,
    clip: float = 0.5,
    ahead: bool = False,
) -> Losses:
    """Train on the rows of one of `n` ranks."""
    losses, norms = [], []
    prefetch = Prefetch(model) if ahead else None
    for step in steps:
        ids, targets, documents = batch_of(step).part(rank, n)
        if prefetch is not None:
            following = batch_of(step + 1).part(rank, n)
            prefetch.start(ids, documents, following.ids, following.documents)
        output = model.run(ids, documents)
        if prefetch is not None:
            prefetch.ask()
        loss = mean_loss(output.hidden, model.head_weight, targets)
        loss.backward()
        norms.append(clip_gradients(model, clip).item())
        optimizer.step()
        optimizer.zero_grad()
        told = torch.stack([loss.detach().double(), *(s.load_E.double() for s in output.routing)][:1])
        load = torch.stack([stats.load_E for stats in output.routing])
        if n > 1:
            dist.all_reduce(told)
            dist.all_reduce(load)
        losses.append(told.item() / n)
        for layer, load_E in zip(model.moe_layers(), load, strict=True):
            layer.update_balance(load_E)
    return Losses(losses, norms)


def whole_parameters(model: EngramLM) -> dict[str, Tensor]:
    """Every parameter, put together from all ranks, on every rank."""
    result = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if isinstance(module, ShardedTable):
                parts = _gathered(value, module.group)
                value = value.new_empty(module.n_rows, value.shape[1])
                for first, part in enumerate(parts):
                    value[first :: module.n_shards] = part
            elif isinstance(module, ShardedExperts):
                value = torch.cat(_gathered(value, module.group))
            result[f"{prefix}.{name}".removeprefix(".")] = value
    return result


def _gathered(value: Tensor, group: Any) -> list[Tensor]:
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, value, group=group)
    return parts


def optimizer_of(model: EngramLM, **settings: Any) -> Together:
    return build_optimizer(model, OptimConfig(**settings))
