"""The cache against plain indexing under any reads, and what it holds against counts taken by hand."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.memory import MemoryTable, row_cache
from engram.memory.row_cache import RowCache

CPU = torch.device("cpu")
READ = st.lists(st.integers(0, 29), min_size=0, max_size=12)


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Choose the hot rows every few reads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_cache, "PERIOD", 7)
        yield


def table_of(n_rows: int) -> Tensor:
    """A row's bytes say which row it is."""
    return torch.arange(n_rows, dtype=torch.uint8).unsqueeze(1).expand(-1, 3).contiguous()


@settings(max_examples=80, deadline=None)
@given(capacity=st.integers(1, 40), reads=st.lists(READ, max_size=25))
def test_a_slot_holds_the_row_that_it_is_found_by(capacity: int, reads: list[list[int]]) -> None:
    records = table_of(30)
    cache = RowCache(capacity, lambda rows: records[rows], 3, CPU, CPU)
    for read in reads:
        rows = torch.tensor(read, dtype=torch.int64)
        slots = cache.find(rows)
        cached = slots >= 0
        assert torch.equal(cache.records[slots[cached]], records[rows[cached]])
        assert len(cache.records) <= max(capacity, 1)
        cache.count(rows)


@settings(max_examples=40, deadline=None)
@given(capacity=st.integers(1, 40), reads=st.lists(READ, max_size=15), kind=st.sampled_from(["float", "int8", "fp8"]))
def test_values_are_the_same_whatever_was_read_before(capacity: int, reads: list[list[int]], kind: str) -> None:
    table = MemoryTable(30, 5)
    plain = table.read_only(kind)  # type: ignore[arg-type]
    cached = table.to_host(cache_rows=capacity, rows=kind)  # type: ignore[arg-type]
    with torch.no_grad():
        waiting = []
        for read in reads:
            rows = torch.tensor(read, dtype=torch.int64).view(1, -1, 1)
            waiting.append((plain(rows), cached.start(rows)))  # several on their way at a time
            if len(waiting) > 2:
                expected, values = waiting.pop(0)
                assert torch.equal(values(), expected)
        for expected, values in waiting:
            assert torch.equal(values(), expected)
    assert cached.stats().lookups == sum(len(read) for read in reads)


def test_the_rows_read_most_often_stay() -> None:
    reads = torch.randint(0, 100, (4000,), generator=torch.Generator().manual_seed(1)) ** 2 // 100
    cache = RowCache(10, lambda rows: table_of(100)[rows], 3, CPU, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_cache, "PERIOD", 10**9)
        cache.count(reads)
        cache.refresh()
    counts = Counter(reads.tolist())
    least_kept = min(counts[row] for row in cache.rows.tolist())
    assert len(cache.rows) == 10
    assert sum(count > least_kept for count in counts.values()) < 10


def test_rows_that_were_hot_make_way_for_those_that_are() -> None:
    cache = RowCache(2, lambda rows: table_of(30)[rows], 3, CPU, CPU)
    for _ in range(20):
        cache.count(torch.tensor([3, 4, 3, 4, 3, 4, 3]))
    assert cache.rows.tolist() == [3, 4]
    for _ in range(20):
        cache.count(torch.tensor([8, 9, 8, 9, 8, 9, 8]))
    assert cache.rows.tolist() == [8, 9]


def test_a_row_read_once_is_not_worth_its_copy() -> None:
    loaded: list[int] = []

    def load(rows: Tensor) -> Tensor:
        loaded.extend(rows.tolist())
        return table_of(30)[rows]

    cache = RowCache(5, load, 3, CPU, CPU)
    cache.count(torch.tensor([5, 6, 7, 7, 8, 9, 10]))
    assert loaded == [7]


@pytest.mark.parametrize("width", [1, 10, 100])
def test_hot_rows_are_chosen_once_in_so_many_lookups_however_they_repeat(width: int) -> None:
    table = MemoryTable(30, 5).to_host(cache_rows=10)
    rows = torch.arange(10).repeat(60).view(-1, width)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(row_cache, "PERIOD", 500)
        for row in rows:
            table(row)
        table.reset_stats()
        table(torch.arange(10))
    assert table.stats().hits == 10


def test_what_fills_the_cache_is_counted() -> None:
    table = MemoryTable(30, 5).to_host(cache_rows=4)
    load, loaded = table._load, []

    def note(rows: Tensor) -> Tensor:
        loaded.extend(rows.tolist())
        return load(rows)

    table._load = note  # type: ignore[method-assign]
    with torch.no_grad():
        for read in torch.randint(0, 30, (40, 6)):
            table(read)
    table.warm(torch.arange(3))  # when all those are counted
    stats = table.stats()
    assert stats.hits > 0
    assert stats.bytes_moved == stats.bytes_fetched == len(loaded) * 20


def test_a_cache_that_could_not_be_filled_says_so_at_the_next_read() -> None:
    table, rows = MemoryTable(30, 5), torch.arange(8).repeat(2)
    moved, calls = table.to_host(cache_rows=4), []
    load = moved._load

    def refuse_the_second(rows: Tensor) -> Tensor:
        calls.append(rows)
        if len(calls) == 2:
            raise MemoryError("no room")
        return load(rows)

    moved._load = refuse_the_second  # type: ignore[method-assign]
    with torch.no_grad():
        assert torch.equal(moved(rows), table(rows))
        with pytest.raises(MemoryError, match="no room"):
            moved(rows)
        for _ in range(3):
            assert torch.equal(moved(rows), table(rows))
    assert moved.stats().hits > 0


def test_a_cache_of_a_hundredth_of_the_rows_serves_most_reads_of_a_zipf_law() -> None:
    g = torch.Generator().manual_seed(0)
    weights = 1 / torch.arange(1, 20_001, dtype=torch.float64)
    table = MemoryTable(20_000, 4).to_host(cache_rows=200)
    draw = lambda: torch.multinomial(weights, 4000, replacement=True, generator=g).view(1, -1, 1)  # noqa: E731
    with torch.no_grad():
        for _ in range(10):
            table(draw())
        table.reset_stats()
        for _ in range(10):
            table(draw())
    best = float(weights[:200].sum() / weights.sum())  # of any cache that does not know the future
    stats = table.stats()
    assert 0.9 * best < stats.hit_rate < 1.05 * best
    assert stats.lookups == 40_000
    # Rows are read once in a batch at most.
    assert stats.bytes_moved <= (stats.lookups - stats.hits) * 16
