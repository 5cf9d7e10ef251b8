"""What of a parameter lies in this process, and how many processes hold the same."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Replicate

from engram.parallel.table import ShardedTable


def local_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor that lies here, sharing its memory; any other tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def copies_of(model: nn.Module) -> dict[nn.Parameter, int]:
    """For each parameter of a model, how many processes hold the very numbers that this one holds; 1 for all of them
    where there is one process."""
    # What FSDP2 was not given has one holder; where it was given nothing, only rows of tables are spread.
    elsewhere = dist.get_world_size() if is_spread(model) and not _is_sharded(model) else 1
    copies = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            copies[parameter] = getattr(module, "copies", elsewhere)
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                for dim, placement in enumerate(parameter.placements):
                    copies[parameter] *= mesh.size(dim) if isinstance(placement, Replicate) else 1
    return copies


def is_spread(model: nn.Module) -> bool:
    """Whether `parallelize`, or `shard_tables` alone, has spread a model over processes."""
    return _is_sharded(model) or any(isinstance(module, ShardedTable) for module in model.modules())


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds its dense parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
