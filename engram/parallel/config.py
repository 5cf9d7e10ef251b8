"""How a run's processes share one model: sizes of the mesh's dimensions, checked against the number of processes.

Every process is a data process: it has its own share of each batch. What differs is how the parameters lie on them:
dense ones replicated and sharded (`replicate` x `shard` is all processes), experts over groups of `expert`, rows of
memory tables over groups of `table`.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram.config import ConfigError, require

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Sizes of a mesh; -1 takes what the others leave.

    replicate, shard: copies of the dense parameters, and shards of each copy (FSDP2); together all processes.
    expert: processes that share the experts of a layer; each group of them holds all, and groups shard (or, where dense
    parameters are not sharded that far, copy) what is left. table: processes that share the rows of each memory table,
    `all` or a number; with fewer than all, groups hold copies.
    prefetch: exchange the row indices of the next batch while this one is computed, and fetch rows while the blocks
    before a memory layer run.
    """

    replicate: int = 1
    shard: int = -1
    expert: int = 1
    table: int | str = ALL
    prefetch: bool = True

    def __post_init__(self) -> None:
        for name in ("replicate", "shard", "expert"):
            value = getattr(self, name)
            require(value == -1 or value >= 1, f"parallel.{name}", value, "1 or more, or -1 for what is left")
        is_count = isinstance(self.table, int) and self.table >= 1
        require(is_count or self.table == ALL, "parallel.table", self.table, "1 or more, or all")
        if self.replicate == -1 and self.shard == -1:
            raise ConfigError("parallel.replicate and parallel.shard are both -1: allowed is one of them at most")

    def sizes(self, world: int) -> MeshSizes:
        """The sizes for `world` processes. Raises `ConfigError` for a combination that they cannot form."""
        replicate, shard, expert = self.replicate, self.shard, self.expert
        processes = f"the number of processes ({world})"
        if shard == -1:
            require(world % replicate == 0, "parallel.replicate", replicate, f"a divisor of {processes}")
            shard = world // replicate
        elif replicate == -1:
            require(world % shard == 0, "parallel.shard", shard, f"a divisor of {processes}")
            replicate = world // shard
        allowed = f"such that replicate x shard is {processes}"
        require(replicate * shard == world, "parallel.replicate x parallel.shard", f"{replicate} x {shard}", allowed)
        expert = world if expert == -1 else expert
        require(world % expert == 0, "parallel.expert", expert, f"a divisor of {processes}")
        require(
            shard % expert == 0 or expert % shard == 0,
            "parallel.expert",
            expert,
            f"a divisor or a multiple of shard ({shard}), so that groups of experts fit its rows",
        )
        table = world if isinstance(self.table, str) else self.table
        require(world % table == 0, "parallel.table", table, f"all, or a divisor of {processes}")
        return MeshSizes(replicate, shard, expert, table)


@dataclass(frozen=True)
class MeshSizes:
    """Sizes that fit: `replicate * shard` processes; `expert` and `table` divide it."""

    replicate: int
    shard: int
    expert: int
    table: int

    @property
    def world(self) -> int:
        """All processes."""
        return self.replicate * self.shard

    @property
    def expert_shard(self) -> int:
        """Shards of the experts that one process of an expert group holds, on top of being one of a group."""
        return max(self.shard // self.expert, 1)

    @property
    def expert_replicate(self) -> int:
        """Copies of each shard of an expert."""
        return self.world // self.expert // self.expert_shard
