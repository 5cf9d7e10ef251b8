"""Sizes of a mesh: what fits is taken, what does not is refused with the sizes named; groups are as documented."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from small_model import MODEL, build
from world import World

from engram.config import ConfigError
from engram.parallel.config import ParallelConfig
from engram.parallel.mesh import Mesh

SIZE = st.sampled_from([-1, 1, 2, 3, 4, 6, 8, 12, 16])


@given(st.integers(1, 64), SIZE, SIZE, SIZE, st.one_of(st.just("all"), st.integers(1, 16)))
def test_sizes_fit_the_processes_or_are_refused(
    world: int, replicate: int, shard: int, expert: int, table: int | str
) -> None:
    asked = {"replicate": replicate, "shard": shard, "expert": expert, "table": table}
    try:
        sizes = ParallelConfig(**asked).sizes(world)  # type: ignore[arg-type]
    except ConfigError:
        return
    assert sizes.replicate * sizes.shard == sizes.world == world
    assert sizes.expert * sizes.expert_shard * sizes.expert_replicate == world
    assert world % sizes.table == 0
    for name, value in asked.items():
        assert value in (-1, "all") or getattr(sizes, name) == value
    # A group of experts never cuts across the rows of the dense mesh.
    assert sizes.shard % sizes.expert == 0 or sizes.expert % sizes.shard == 0


@pytest.mark.parametrize(
    ("settings", "world", "message"),
    [
        ({"replicate": 3}, 8, "parallel.replicate is 3: allowed is a divisor of the number of processes (8)"),
        ({"replicate": 2, "shard": 2}, 8, "parallel.replicate x parallel.shard is '2 x 2': allowed is such that"),
        ({"expert": 3}, 8, "parallel.expert is 3: allowed is a divisor of the number of processes (8)"),
        (
            {"replicate": 4, "shard": 3, "expert": 2},
            12,
            "parallel.expert is 2: allowed is a divisor or a multiple of shard",
        ),
        ({"table": 5}, 8, "parallel.table is 5: allowed is all, or a divisor of the number of processes (8)"),
        ({"table": "some"}, 8, "parallel.table is 'some': allowed is 1 or more, or all"),
        ({"shard": 0}, 8, "parallel.shard is 0: allowed is 1 or more, or -1 for what is left"),
        ({"replicate": -1}, 8, "parallel.replicate and parallel.shard are both -1"),
    ],
)
def test_impossible_combinations_are_named(settings: dict[str, int], world: int, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ParallelConfig(**settings).sizes(world)  # type: ignore[arg-type]
    assert str(refused.value).startswith(message)


def groups(rank: int, n: int) -> dict[str, list[int]]:
    mesh = Mesh.of(ParallelConfig(replicate=2, expert=2, table=4), "cpu")
    named = {"shard": mesh.dense, "expert": mesh.experts, "expert_shard": mesh.experts, "table": mesh.tables}
    return {name: dist.get_process_group_ranks(view.get_group(name)) for name, view in named.items()}


def test_groups_of_experts_and_tables_are_neighbouring_ranks(world_of: Callable[[int], World]) -> None:
    for rank, found in enumerate(world_of(4).run(groups)):
        pair = [rank // 2 * 2, rank // 2 * 2 + 1]
        assert found == {"shard": pair, "expert": pair, "expert_shard": [rank], "table": [0, 1, 2, 3]}


def refused_experts(rank: int, n: int) -> str:
    try:
        build({"expert": 4}, changes={"experts": {**MODEL["experts"], "n_experts": 6}})
    except ConfigError as error:
        return str(error)
    return ""


def test_experts_that_cannot_be_shared_evenly_are_refused(world_of: Callable[[int], World]) -> None:
    said = world_of(4).run(refused_experts)
    assert said == ["parallel.expert is 4: allowed is a divisor of experts.n_experts (6)"] * 4


def alone(rank: int, n: int) -> tuple[float, float]:
    ids = torch.arange(64).view(4, 16)
    return build({})(ids).logsumexp(-1).mean().item(), build()(ids).logsumexp(-1).mean().item()


def test_a_group_of_one_process_computes_what_the_model_does(world_of: Callable[[int], World]) -> None:
    spread, whole = world_of(1).run(alone)[0]
    assert spread == pytest.approx(whole, abs=1e-6)


def warned(rank: int, n: int, mesh: dict[str, int], n_experts: int) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(mesh, changes={"experts": {**MODEL["experts"], "n_experts": n_experts, "top_k": 2}})
    return [str(w.message) for w in caught if "FSDP2 cuts" in str(w.message)]


def test_experts_cut_over_more_processes_than_there_are_of_them_are_warned_of(
    world_of: Callable[[int], World],
) -> None:
    assert world_of(4).run(warned, {"expert": 2}, 4) == [[]] * 4  # two here, over two processes
    assert world_of(4).run(warned, {}, 4) == [[]] * 4
    for said in world_of(4).run(warned, {}, 2):
        assert len(said) == 1
        assert "FSDP2 cuts 2 experts of a layer over 4 processes, so that each gather of them is 2.0 times" in said[0]
