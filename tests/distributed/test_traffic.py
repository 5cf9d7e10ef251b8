"""The formulas of traffic are what real runs send, byte by byte; and what follows from them alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from counted import checked
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import MODEL
from world import World

from engram.config import ModelConfig
from engram.parallel.config import MeshSizes, ParallelConfig
from engram.parallel.traffic import (
    Parts,
    Reads,
    Routed,
    expected_ranks,
    expected_reads,
    expected_routed,
    step_traffic,
    total,
)

PARTS = Parts.of(ModelConfig.from_dict(MODEL))


@pytest.mark.parametrize(
    ("n", "mesh", "precision"),
    [(2, {"expert": 2}, "autocast"), (2, {"table": 1}, "float32"), (4, {"replicate": 2, "table": 2}, "bfloat16")],
)
def test_every_byte_and_call_of_a_step_is_in_the_formulas(
    world_of: Callable[[int], World], n: int, mesh: dict[str, int], precision: str
) -> None:
    for formula, counted in checked(world_of(n), {"expert": 2, **mesh}, precision):
        assert formula == counted
        assert total(counted).sent > 0


def meshes() -> st.SearchStrategy[MeshSizes]:
    return st.builds(
        lambda replicate, shard, expert, table: MeshSizes(replicate, shard, min(expert, shard), min(table, shard)),
        *[st.sampled_from([1, 2, 4, 8])] * 4,
    )


def counts(n: int, members: int) -> st.SearchStrategy[list[list[int]]]:
    row = st.lists(st.integers(0, 1000), min_size=members, max_size=members)
    return st.lists(row, min_size=n, max_size=n)


def routed(tokens: list[list[int]], rank: int, expert: int) -> Routed:
    """With three copies of each token that goes anywhere."""
    return Routed.of(tokens, [[3 * t for t in row] for row in tokens], rank, expert)


@given(st.data(), meshes())
def test_what_all_send_is_what_all_receive(data: st.DataObject, sizes: MeshSizes) -> None:
    wanted = data.draw(counts(sizes.world, sizes.table))
    tokens = data.draw(counts(sizes.world, sizes.expert))
    flows = [
        total(step_traffic(PARTS, sizes, [Reads.of(wanted, r, sizes.table)], [routed(tokens, r, sizes.expert)], r))
        for r in range(sizes.world)
    ]
    assert sum(flow.sent for flow in flows) == sum(flow.received for flow in flows)
    assert len({flow.calls for flow in flows}) == 1


@settings(max_examples=20)
@given(meshes(), st.integers(0, 10_000), st.integers(100, 10**6))
def test_traffic_does_not_grow_with_the_table_but_with_the_rows_that_are_read(
    sizes: MeshSizes, distinct: int, rows: int
) -> None:
    larger = {**MODEL, "memory": {**MODEL["memory"], "rows": [rows, rows]}}
    parts, reads = Parts.of(ModelConfig.from_dict(larger)), expected_reads(distinct, sizes)
    flows = step_traffic(parts, sizes, [reads] * parts.tables, [])
    assert flows == step_traffic(PARTS, sizes, [reads] * PARTS.tables, [])
    assert total(flows, "table rows").received == pytest.approx(parts.row_bytes * reads.asks * parts.tables)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_one_process_sends_nothing(distinct: int, tokens: int) -> None:
    alone = ParallelConfig().sizes(1)
    moe = expected_routed(tokens, 8, 3, 1)
    assert step_traffic(PARTS, alone, [expected_reads(distinct, alone)], [moe]) == {}
    assert moe == Routed(0, 0, 0, 0)


@pytest.mark.parametrize(("experts", "top_k", "n"), [(8, 3, 2), (8, 3, 4), (8, 1, 8), (6, 6, 3), (12, 4, 4)])
def test_expected_ranks_of_a_token_are_the_mean_over_all_choices(experts: int, top_k: int, n: int) -> None:
    choices: list[Any] = list(combinations(range(experts), top_k))
    mean = sum(len({expert // (experts // n) for expert in choice}) for choice in choices) / len(choices)
    assert expected_ranks(experts, top_k, n) == pytest.approx(mean)
