"""The groups of processes that share dense parameters, experts and table rows.

Ranks are numbered replica by replica: rank = replicate index * shard + shard index. Groups of experts and of table rows
are runs of neighbouring ranks, so that on a cluster they lie within a machine as long as they fit there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from engram.config import require
from engram.parallel.config import MeshSizes, ParallelConfig

_IN_ORDER = ("expert_replicate", "expert", "expert_shard")


@dataclass(frozen=True)
class Mesh:
    """Three views of all ranks.

    dense: (replicate, shard). experts: (expert_replicate, expert_shard, expert): the last is the group that shares the
    experts of a layer, the others shard and copy what a member holds. tables: (table_replicate, table).
    """

    sizes: MeshSizes
    dense: DeviceMesh
    experts: DeviceMesh
    tables: DeviceMesh

    @classmethod
    def of(cls, config: ParallelConfig, device_type: str) -> Mesh:
        """The mesh of all processes of the default group, each of which must call this.

        Raises `ConfigError` for sizes that the number of processes can't form.
        """
        require(dist.is_initialized(), "the process group", None, "one that torch.distributed has set up")
        sizes = config.sizes(dist.get_world_size())
        return cls(
            sizes,
            init_device_mesh(device_type, (sizes.replicate, sizes.shard), mesh_dim_names=("replicate", "shard")),
            init_device_mesh(
                device_type,
                (sizes.expert_replicate, sizes.expert_shard, sizes.expert),
                mesh_dim_names=("expert_replicate", "expert_shard", "expert"),
            ),
            init_device_mesh(
                device_type,
                (sizes.world // sizes.table, sizes.table),
                mesh_dim_names=("table_replicate", "table"),
            ),
        )

    @property
    def for_dense(self) -> DeviceMesh:
        """What `fully_shard` takes for dense parameters."""
        return self.dense if self.sizes.replicate > 1 else self.dense["shard"]

    @cached_property
    def experts_in_order(self) -> DeviceMesh:
        """(expert_replicate, expert, expert_shard): experts in their order are cut by the second, then by the third.
        A layout alone: it has no groups."""
        ranks = self.experts.mesh.permute(0, 2, 1)
        return DeviceMesh(self.experts.device_type, ranks, mesh_dim_names=_IN_ORDER, _init_backend=False)

    @property
    def for_experts(self) -> DeviceMesh | None:
        """What `fully_shard` takes for the experts that a process holds; None if it is alone with them."""
        if self.sizes.expert == self.sizes.world:
            return None
        if self.sizes.expert_replicate > 1:
            return self.experts["expert_replicate", "expert_shard"]
        return self.experts["expert_shard"]
