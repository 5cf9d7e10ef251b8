"""Tables spread over processes: every row once, balanced traffic in proportion to distinct rows, rows fetched ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from small_model import CPU, build, optimizer_of, train, whole_parameters
from torch import Tensor
from world import World

from engram.memory import MemoryTable
from engram.parallel.config import ParallelConfig
from engram.parallel.mesh import Mesh
from engram.parallel.table import Lookup, ShardedTable

WorldOf = Callable[[int], World]
WIDTH = 3


def zipf_rows(rank: int, n_rows: int, count: int) -> Tensor:
    """Rows by Zipf's law, row 0 the most frequent, other draws on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.multinomial(1 / torch.arange(1.0, n_rows + 1), count, replacement=True, generator=generator)


def whole_table(n_rows: int) -> MemoryTable:
    torch.manual_seed(5)
    return MemoryTable(n_rows, WIDTH)


def sharded(n_rows: int, group: int) -> ShardedTable:
    return ShardedTable(whole_table(n_rows), Mesh.of(ParallelConfig(table=group), "cpu"))


def read_and_give_back(rank: int, n: int, n_rows: int, group: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """What this rank read, its places' gradients, which rows they are, and how many rows lie here."""
    table = sharded(n_rows, group)
    rows = zipf_rows(rank, n_rows, 60).view(5, 4, 3)
    values = table(rows)
    (values * (1.0 + rank)).sum().backward()
    assert table.weight.grad is not None
    grad = table.weight.grad.to_dense()
    return values.detach(), grad, torch.arange(table.rank, n_rows, table.n_shards), len(table.weight)


@pytest.mark.parametrize(("n", "group", "n_rows"), [(2, 2, 101), (4, 4, 101), (4, 2, 50), (4, 1, 50), (4, 4, 3)])
def test_rows_are_those_of_the_whole_table_and_their_gradients_the_mean_over_processes(
    world_of: WorldOf, n: int, group: int, n_rows: int
) -> None:
    whole = whole_table(n_rows)
    results = world_of(n).run(read_and_give_back, n_rows, group)
    expected = torch.zeros_like(whole.weight)
    for rank, (values, *_) in enumerate(results):
        rows = zipf_rows(rank, n_rows, 60).view(5, 4, 3)
        assert torch.equal(values, whole.weight[rows])
        expected.index_add_(0, rows.flatten(), torch.full((60, WIDTH), (1.0 + rank) / n))
    for _, grad, here, _ in results:
        torch.testing.assert_close(grad, expected[here])
    assert sum(count for *_, count in results[:group]) == n_rows
    assert {count for *_, count in results} <= {n_rows // group, -(-n_rows // group)}


def traffic(rank: int, n: int, n_rows: int) -> tuple[int, list[int], list[int]]:
    """Distinct rows read here, and how many go to each owner and come from each reader."""
    table = sharded(n_rows, n)
    rows = zipf_rows(rank, 2000, 3000)
    lookup = Lookup(rows, table.per_owner, table.group)
    lookup.values(table.weight)
    return len(rows.unique()), *lookup.exchange.counts


def test_traffic_is_in_proportion_to_distinct_rows_and_not_to_the_table(world_of: WorldOf) -> None:
    small, large = (world_of(4).run(traffic, n_rows) for n_rows in (2000, 200_000))
    for (distinct, sends, _), (same, again, _) in zip(small, large, strict=True):
        assert sum(sends) == distinct == same == sum(again)
        assert distinct < 1500  # of 3000 reads


def test_owners_share_the_traffic_of_the_most_frequent_rows(world_of: WorldOf) -> None:
    """Rows by their rank in Zipf's law are the worst case: by ranges, the first owner would have most of them."""
    served = [sum(receives) for _, _, receives in world_of(4).run(traffic, 2000)]
    assert max(served) < 1.1 * sum(served) / 4
    by_range = torch.bincount(torch.cat([zipf_rows(rank, 2000, 3000).unique() for rank in range(4)]) // 500)
    assert by_range.max() > 1.5 * by_range.sum() / 4


def trained(rank: int, n: int, mesh: dict[str, Any], ahead: bool) -> tuple[list[float], dict[str, Tensor]]:
    model = build(mesh)
    optimizer = optimizer_of(model, matrix_optimizer="adamw", lr=1e-2)
    losses = train(model, optimizer, range(6), rank, n, ahead=ahead).loss
    model.eval()  # reads of validation are no part of what is prepared
    ids = torch.arange(32).view(2, 16) + rank
    with torch.no_grad():
        losses.append(model(ids).logsumexp(-1).mean().item())
    model.train()
    return losses, whole_parameters(model)


@pytest.mark.parametrize("mesh", [{}, {"table": 2, "expert": 4}])
def test_fetching_ahead_changes_nothing(world_of: WorldOf, mesh: dict[str, Any]) -> None:
    with_it, without = (world_of(4).run(trained, mesh, ahead) for ahead in (True, False))
    for (losses, parameters), (others, other_parameters) in zip(with_it, without, strict=True):
        assert losses == others
        assert all(torch.equal(parameters[name], other_parameters[name]) for name in parameters)


def read_what_was_not_prepared(rank: int, n: int) -> str:
    table = sharded(50, n)
    table.prepare(torch.arange(6).view(1, 2, 3))
    try:
        table(torch.arange(1, 7).view(1, 2, 3))
    except RuntimeError as error:
        return str(error)
    return ""


def test_reading_other_rows_than_were_prepared_is_refused(world_of: WorldOf) -> None:
    for said in world_of(2).run(read_what_was_not_prepared):
        assert "prepared for other rows" in said


def first_values(rank: int, n: int, dtype: str) -> tuple[dict[str, Tensor], int]:
    """Parameters at the start, and numbers that lie here."""
    mesh = {"expert": 2}
    model = build(mesh, changes={"memory": {**MEMORY, "table_dtype": dtype}})
    return whole_parameters(model), sum(p.numel() for name, p in model.named_parameters() if "table" in name)


MEMORY = {"layers": [0, 1], "n_heads": 2, "row_width": 4, "rows": [50, 50], "compress": False}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_spread_model_starts_as_the_whole_one_and_holds_its_share_of_rows(world_of: WorldOf, dtype: str) -> None:
    whole = build(changes={"memory": {**MEMORY, "table_dtype": dtype}})
    expected = dict(whole.named_parameters())
    results = world_of(4).run(first_values, dtype)
    for parameters, _ in results:
        assert parameters.keys() == expected.keys()
        assert all(torch.equal(parameters[name], expected[name]) for name in expected)
    in_tables = sum(p.numel() for name, p in expected.items() if "table" in name)
    assert sum(held for _, held in results) == in_tables
    assert max(held for _, held in results) <= in_tables / 4 + 2 * MEMORY["row_width"]


def peak_of_building(rank: int, n: int) -> int:
    """Bytes of the largest tensor made on the CPU while a model is built."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.device == CPU:
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        build({}, changes={"memory": {**MEMORY, "rows": [200_000, 200_000]}})
    dist.barrier()
    return largest


def test_no_process_ever_holds_a_whole_table(world_of: WorldOf) -> None:
    table = 4 * 200_000 * MEMORY["row_width"] * 4
    assert all(peak < table / 3 for peak in world_of(4).run(peak_of_building))
