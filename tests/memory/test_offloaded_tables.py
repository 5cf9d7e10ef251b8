"""Tables on the host and on disk against plain indexing: in every place, as they move, and fetched ahead."""

import copy
import multiprocessing
import os
import pickle
import threading
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from engram.config import ConfigError
from engram.memory import DiskTable, MemoryTable, OffloadedTable, read_only
from engram.memory.offloaded import HostTable
from engram.memory.reading import MANY_ROWS
from engram.memory.row_formats import RowKind

KINDS = get_args(RowKind)


def elsewhere(
    table: MemoryTable, place: str, folder: Path, cache_rows: int = 0, rows: RowKind = "float"
) -> OffloadedTable:
    if place == "host":
        return table.to_host(cache_rows=cache_rows, rows=rows)
    return table.to_disk(folder / "table.safetensors", cache_rows=cache_rows, rows=rows)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cache_rows", [0, 20])
@pytest.mark.parametrize("prefetch", [True, False])
def test_rows_are_those_of_the_table(
    place: str, dtype: torch.dtype, cache_rows: int, prefetch: bool, tmp_path: Path
) -> None:
    table = MemoryTable(300, 7, dtype)
    moved = elsewhere(table, place, tmp_path, cache_rows)
    moved.prefetch = prefetch
    with torch.no_grad():
        for shape in [(2, 5, 4), (1, 1, 16), (0, 3, 2), (3, 200, 1)]:
            rows = torch.randint(0, 300, shape)
            assert torch.equal(moved(rows), table(rows))
            begun = moved.start(rows)
            assert torch.equal(begun(), table(rows))
        if cache_rows:
            moved.warm(torch.arange(300))
            assert moved.stats().hits == 0
            assert torch.equal(moved(torch.arange(300)), table(torch.arange(300)))
            assert moved.stats().hits == cache_rows


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_rows_are_the_same_in_every_place(place: str, kind: RowKind, tmp_path: Path) -> None:
    table, rows = MemoryTable(300, 12, torch.bfloat16), torch.randint(0, 300, (2, 9, 4))
    with torch.no_grad():
        here = table.read_only(kind)(rows)
        assert torch.equal(elsewhere(table, place, tmp_path, rows=kind)(rows), here)
        assert torch.equal(elsewhere(table, place, tmp_path, 30, rows=kind)(rows), here)
        if place == "disk":
            assert torch.equal(DiskTable(tmp_path / "table.safetensors")(rows), here)


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("row", [-1, -(2**63), 300])
@pytest.mark.parametrize("cache_rows", [0, 20])
def test_rows_beyond_the_table_are_refused(place: str, row: int, cache_rows: int, tmp_path: Path) -> None:
    moved = elsewhere(MemoryTable(300, 4), place, tmp_path, cache_rows)
    with torch.no_grad(), pytest.raises(IndexError, match=f"{row}"):
        moved(torch.tensor([[[5, row]]]))
    if cache_rows:
        with pytest.raises(IndexError, match=f"{row}"):
            moved.warm(torch.tensor([5, row]))
        moved.warm(torch.tensor([5]))
        with torch.no_grad(), pytest.raises(IndexError, match=f"{row}"):
            moved(torch.tensor([[[5, row]]]))


@pytest.mark.parametrize("place", ["host", "disk"])
def test_reading_with_gradients_is_refused_until_the_table_is_frozen(place: str, tmp_path: Path) -> None:
    table, rows = MemoryTable(30, 4), torch.tensor([[[1, 2]]])
    moved = elsewhere(table, place, tmp_path)
    with pytest.raises(ConfigError, match=r"requires_grad_\(False\)"):
        moved(rows)
    with pytest.raises(ConfigError, match="read-only"):
        moved.start(rows)
    moved.requires_grad_(False)
    assert not moved(rows).requires_grad
    # A table that was frozen before is no other after its move.
    table.weight.requires_grad_(False)
    assert torch.equal(elsewhere(table, place, tmp_path)(rows), table(rows))


def test_a_table_stays_where_it_is_when_its_model_moves_or_changes_type(tmp_path: Path) -> None:
    table, rows = MemoryTable(30, 4), torch.randint(0, 30, (1, 2, 3))
    for moved in (table.to_host(), table.to_disk(tmp_path / "table")):
        model = nn.ModuleDict({"table": moved, "linear": nn.Linear(2, 2)}).to(torch.float64).to("meta")
        assert model["linear"].weight.is_meta
        with torch.no_grad():
            assert torch.equal(model["table"](rows), table(rows))


def test_a_table_on_the_host_takes_no_second_copy() -> None:
    table = MemoryTable(30, 4)
    assert table.to_host().records.data_ptr() == table.weight.data_ptr()


def test_copies_share_their_rows_and_pickles_open_their_file(tmp_path: Path) -> None:
    table, rows = MemoryTable(30, 4), torch.randint(0, 30, (1, 2, 3))
    with torch.no_grad():
        for moved in (table.to_host(cache_rows=3), table.to_disk(tmp_path / "table", cache_rows=3)):
            assert torch.equal(moved(rows), table(rows))  # its thread runs
            twin = copy.deepcopy(moved)
            assert twin.records.data_ptr() == moved.records.data_ptr()
            assert torch.equal(twin(rows), table(rows))
            data = pickle.dumps(moved)
            assert torch.equal(pickle.loads(data)(rows), table(rows))
        assert len(data) < 30 * 4 * 4 + 2000


def test_a_pickle_finds_its_file_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, rows = MemoryTable(30, 4), torch.arange(30)
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(table.to_disk("table"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with torch.no_grad():
        assert torch.equal(pickle.loads(data)(rows), table.weight)


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        (MemoryTable(31, 4), "float"),
        (MemoryTable(30, 5), "float"),
        (MemoryTable(30, 8, torch.bfloat16), "float"),
        (MemoryTable(30, 12), "int8"),
    ],
)
def test_a_pickle_of_what_its_file_held_before_is_refused(other: MemoryTable, kind: RowKind, tmp_path: Path) -> None:
    path = tmp_path / "table"
    data = pickle.dumps(MemoryTable(30, 4).to_disk(path))
    path.unlink()
    other.to_disk(path, rows=kind)
    with pytest.raises(ConfigError, match=rf"{path}.*allowed is .*\[30, 16\]"):
        pickle.loads(data)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_hold_the_rows_and_load_where_rows_are_the_same(
    kind: RowKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_only, "_PART", 28)  # 7 rows at a time
    table = MemoryTable(30, 4)
    with torch.no_grad():
        table.weight[3, 1] = -0.0
        if kind == "float":
            table.weight[4, 2] = torch.nan
    tables = (table.read_only(kind), table.to_host(rows=kind), table.to_disk(tmp_path / "table", rows=kind))
    for moved in tables:
        name, rows = next(iter(moved.state_dict().items()))
        assert name == ("weight" if kind == "float" else "records")
        moved.load_state_dict(moved.state_dict())
        moved.load_state_dict({name: rows.clone()})
        for row in (0, 29):
            others = rows.clone()
            others[row] = 1
            with pytest.raises(RuntimeError, match=f"{name}: a read-only table takes no other rows"):
                moved.load_state_dict({name: others}, strict=False)
        with pytest.raises(RuntimeError, match="read-only"):
            moved.load_state_dict({name: rows[:-1]})


def test_what_is_written_to_a_state_dict_does_not_reach_the_file(tmp_path: Path) -> None:
    table = MemoryTable(3000, 8)
    moved, other = table.to_disk(tmp_path / "table"), DiskTable(tmp_path / "table")
    was = (tmp_path / "table").read_bytes()
    child = os.fork()
    if child == 0:  # a write that is refused would end the process
        moved.state_dict()["weight"].zero_()
        os._exit(int(moved.records.any()))
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "table").read_bytes() == was
    assert torch.equal(other.records, moved.records)


def test_a_model_with_tables_elsewhere_loads_as_others_do(tmp_path: Path) -> None:
    table, linear = MemoryTable(30, 4), nn.Linear(2, 2)
    model = nn.ModuleDict({"table": table.to_disk(tmp_path / "table"), "linear": linear})
    whole = nn.ModuleDict({"table": table, "linear": nn.Linear(2, 2)}).state_dict()
    model.load_state_dict(whole)
    assert torch.equal(linear.weight, whole["linear.weight"])
    without = {name: tensor for name, tensor in whole.items() if "table" not in name}
    assert model.load_state_dict(without, strict=False).missing_keys == ["table.weight"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"table\.weight"'):
        model.load_state_dict(without)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"table\.records"'):
        model.load_state_dict(whole | {"table.records": torch.zeros(3)})


def test_records_stay_bytes_whatever_type_the_model_is_made_of() -> None:
    table, rows = MemoryTable(30, 4), torch.randint(0, 30, (1, 2, 3))
    for kind in KINDS:
        moved = table.read_only(kind).requires_grad_(False)
        expected = moved(rows)
        for change in (nn.Module.double, nn.Module.half, lambda model: model.type(torch.float64)):
            change(nn.ModuleDict({"table": moved}))
            assert torch.equal(moved(rows), expected)
        assert moved.to("meta").records.is_meta


def test_a_table_that_has_no_rows_yet_cannot_be_moved(tmp_path: Path) -> None:
    with torch.device("meta"):
        table = MemoryTable(30, 4)
    with pytest.raises(ConfigError, match="device of the table is 'meta'"):
        table.to_host()
    with pytest.raises(ConfigError, match="device of the table is 'meta'"):
        table.to_disk(tmp_path / "table", rows="int8")
    assert not list(tmp_path.iterdir())


def read_and_tell(table: OffloadedTable, rows: Tensor, results: "multiprocessing.Queue[tuple[object, int]]") -> None:
    with torch.no_grad():
        values = table(rows)
    results.put((values.tolist(), table.stats().lookups))


@pytest.mark.parametrize(("place", "cache_rows"), [("disk", 0), ("disk", 5), ("host", 5)])
def test_a_forked_process_reads_what_its_parent_has_read(place: str, cache_rows: int, tmp_path: Path) -> None:
    table, rows = MemoryTable(300, 8), torch.tensor([3, 3, 299])
    moved = elsewhere(table, place, tmp_path, cache_rows)
    with torch.no_grad():
        moved(rows)
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[object, int]] = context.Queue()
    child = context.Process(target=read_and_tell, args=(moved, rows, results))
    child.start()
    try:
        assert results.get(timeout=20) == (table.weight[rows].tolist(), 3)
    finally:
        child.kill()
        child.join()
    with torch.no_grad():
        moved(rows)
    assert moved.stats().lookups == 6


# Fetching ahead.


def test_what_is_read_is_counted(tmp_path: Path) -> None:
    table = MemoryTable(300, 8, torch.bfloat16).to_disk(tmp_path / "table", cache_rows=2)
    with torch.no_grad():
        table(torch.tensor([[[1, 2, 2, 3]]]))
        assert (table.stats().lookups, table.stats().hits, table.stats().bytes_moved) == (4, 0, 3 * 16)
        table.reset_stats()
        table.warm(torch.tensor([2, 2, 3, 3, 4]))
        assert table.stats().bytes_moved == table.stats().bytes_fetched == 2 * 16
        table.reset_stats()
        table(torch.tensor([[[1, 2, 2, 3]]]))
    stats = table.stats()
    assert (stats.lookups, stats.hits, stats.hit_rate, stats.bytes_moved) == (4, 3, 0.75, 16)
    assert 0 < stats.fetch_seconds <= stats.wait_seconds < 10
    assert stats.bytes_per_second == 16 / stats.fetch_seconds


def test_rows_are_on_their_way_before_they_are_asked_for(tmp_path: Path) -> None:
    table = MemoryTable(300, 4).to_disk(tmp_path / "table")
    read, load = threading.Event(), table._load

    def note(rows: Tensor) -> Tensor:
        read.set()
        return load(rows)

    table._load = note  # type: ignore[method-assign]
    with torch.no_grad():
        values = table.start(torch.tensor([[[3, 4]]]))
        assert read.wait(10)
        values()
        read.clear()
        table.prefetch = False
        values = table.start(torch.tensor([[[3, 4]]]))
        assert not read.wait(0.2)
        values()
        assert read.is_set()


@pytest.mark.parametrize("place", ["host", "disk"])
def test_compiled_graphs_read_the_same_rows(place: str, tmp_path: Path) -> None:
    table = MemoryTable(300, 4)
    moved = elsewhere(table, place, tmp_path, cache_rows=10)

    def shifted(rows: Tensor) -> Tensor:
        return moved.start(rows)() + 1

    compiled = torch.compile(shifted, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            rows = torch.randint(0, 300, (2, 5, 4))
            assert torch.equal(compiled(rows), table(rows) + 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("place", ["host", "pageable", "disk"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache_rows", [0, 3000])
def test_rows_come_to_a_cuda_device_while_it_computes(
    place: str, kind: RowKind, cache_rows: int, tmp_path: Path
) -> None:
    """Many reads on their way at once, whose memory is given away and taken again all the time."""
    n_rows = 1_100_000  # with a scale, still too many for a copy in torch's own pinned memory
    lengths = [MANY_ROWS // 64, 200, MANY_ROWS // 32]  # in memory of the host two reads are gathered there, one is not
    table = MemoryTable(n_rows, 64, torch.bfloat16)
    if place == "disk":
        moved: OffloadedTable = table.to_disk(tmp_path / "table", cache_rows, kind)
    else:
        moved = table.to_host(place == "host", cache_rows, kind)
    plain = table.read_only(kind).to("cuda")
    busy = torch.randn(2048, 2048, device="cuda")
    with torch.no_grad():
        for _ in range(30):
            reads = [(torch.rand(4, T, 16, device="cuda") ** 6 * n_rows).long() for T in lengths]
            coming = [moved.start(rows) for rows in reads]
            for _ in range(4):
                busy = torch.tanh(busy @ busy)
            for rows, values in zip(reads, coming, strict=True):
                assert torch.equal(values(), plain(rows))
            del reads, coming
    stats = moved.stats()
    assert stats.lookups == 30 * 4 * sum(lengths) * 16
    assert (stats.hit_rate > 0.2) == (cache_rows > 0)
    if place == "host":
        assert isinstance(moved, HostTable)
        assert moved._pinned is not None
        assert moved.records.is_pinned()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cache_rows", [0, 20])
def test_reads_of_the_hosts_memory_are_recorded_in_a_cuda_graph(cache_rows: int) -> None:
    """Also beside a cache that changes its place after that."""
    table, rows = MemoryTable(300, 8), torch.zeros(2, 5, 4, dtype=torch.int64, device="cuda")
    moved, graph = table.to_host(cache_rows=cache_rows), torch.cuda.CUDAGraph()
    with torch.no_grad():
        moved(rows)  # compiles the kernel
        with torch.cuda.graph(graph):
            values = moved.start(rows)()
        for first in (0, 100, 200):
            if cache_rows:
                moved.warm(torch.arange(first, first + 20, device="cuda"))
            rows.copy_(torch.randint(0, 300, rows.shape))
            graph.replay()
            assert torch.equal(values.cpu(), table(rows.cpu()))
