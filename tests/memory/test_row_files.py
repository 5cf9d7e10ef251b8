"""Tables in files: what is written, what is refused or found damaged, and what a process reads and shares of one."""

import hashlib
import json
import multiprocessing
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engram.cli import main
from engram.config import ConfigError
from engram.memory import DiskTable, MemoryTable
from engram.memory.row_formats import RowKind
from engram.tensor_files import read_header

KINDS = get_args(RowKind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_opens_with_safetensors(kind: RowKind, tmp_path: Path) -> None:
    table = MemoryTable(70, 5, torch.bfloat16)
    moved = table.to_disk(tmp_path / "new" / "table.safetensors", rows=kind)
    there = load_file(tmp_path / "new" / "table.safetensors")["weight"]
    assert torch.equal(there.view(torch.uint8), moved.records)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["table.safetensors"]


def test_a_table_among_other_tensors_is_read_where_it_lies(tmp_path: Path) -> None:
    table, rows = MemoryTable(70, 5, torch.bfloat16), torch.randint(0, 70, (1, 4, 2))
    tensors = {"a.bias": torch.randn(3).bfloat16(), "a.table.weight": table.weight.detach(), "z": torch.randn(9)}
    save_file(tensors, tmp_path / "model.safetensors")
    with torch.no_grad():
        moved = DiskTable(tmp_path / "model.safetensors", name="a.table.weight")
        assert torch.equal(moved(rows), table(rows))
    with pytest.raises(ConfigError, match=r"'b'.*a\.table\.weight"):
        DiskTable(tmp_path / "model.safetensors", name="b")
    with pytest.raises(ConfigError, match="z"):
        DiskTable(tmp_path / "model.safetensors", name="z")
    save_file({"nothing": torch.empty(0, 5)}, tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"size of nothing .*\[0, 5\]"):
        DiskTable(tmp_path / "empty", name="nothing")


def test_a_table_is_replaced_by_its_like_alone(tmp_path: Path) -> None:
    path, rows = tmp_path / "table", torch.arange(30)
    first, second = MemoryTable(30, 4), MemoryTable(30, 4)
    with torch.no_grad():
        old = first.to_disk(path)
        new = second.to_disk(path)
        assert torch.equal(new(rows), second.weight)
        assert torch.equal(old(rows), first.weight)  # who opened it before still reads what was there
    for other in (MemoryTable(31, 4), MemoryTable(30, 5), MemoryTable(30, 4, torch.bfloat16)):
        with pytest.raises(ConfigError, match="table of"):
            other.to_disk(path)
    with pytest.raises(ConfigError, match="table of"):
        first.to_disk(path, rows="int8")
    (tmp_path / "notes").write_text("something else")
    with pytest.raises(ConfigError, match="notes"):
        first.to_disk(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "something else"
    save_file({"weight": torch.randn(30, 4)}, tmp_path / "model")
    with pytest.raises(ConfigError, match="model"):
        first.to_disk(tmp_path / "model")


def test_files_that_are_cut_short_or_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table"
    with pytest.raises(ConfigError, match="nothing"):
        DiskTable(tmp_path / "nothing")
    MemoryTable(30, 4).to_disk(path)
    data = path.read_bytes()
    for end in (len(data) - 1, 4096, 100, 8, 3, 0):
        path.write_bytes(data[:end])
        with pytest.raises(ConfigError, match="table"):
            DiskTable(path)
    for header in (
        b"[1, 2]",
        b"{",
        b'{"weight": 3}',
        b'{"weight": {"dtype": "I64", "shape": [2, 2], "data_offsets": [0, 32]}}',
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
        with pytest.raises(ConfigError, match="table"):
            DiskTable(path)


@pytest.mark.parametrize("kind", ["float", "int8"])
def test_whatever_bit_of_a_tables_file_changes_it_is_refused(kind: RowKind, tmp_path: Path) -> None:
    """In the header, in rows and in scales."""
    path = tmp_path / "table"
    MemoryTable(40, 8).to_disk(path, rows=kind)
    data = path.read_bytes()
    header = 8 + len(data[8:4096].rstrip())
    for at in [*range(header), *torch.randint(header, len(data), (100,)).tolist()]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(ConfigError, match="table"):
            DiskTable(path)


def test_rows_are_compared_by_blocks_large_tables_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks that end inside of rows, and inside of what is written at a time."""
    monkeypatch.setattr("engram.digests.BLOCK", 1000)
    monkeypatch.setattr("engram.memory.row_files.BLOCK", 1000)
    monkeypatch.setattr("engram.memory.read_only._PART", 700)
    path, table = tmp_path / "table", MemoryTable(333, 7)
    table.to_disk(path)
    data = path.read_bytes()
    rows = data[-333 * 28 :]
    blocks = [hashlib.sha256(rows[at : at + 1000]).hexdigest() for at in range(0, len(rows), 1000)]
    assert read_header(path).metadata["blocks_sha256"].split() == blocks
    assert torch.equal(load_file(path)["weight"], table.weight)
    assert main(["verify", str(path)]) == 0
    path.write_bytes(data[:-2500] + bytes([data[-2500] ^ 1]) + data[-2499:])
    said = "rows are damaged in 1 of 10 blocks of 0 MiB, the first is number 6"
    with pytest.raises(ConfigError, match=said):
        DiskTable(path)
    monkeypatch.setattr("engram.memory.row_files.CHECKED_BYTES", 1000)
    DiskTable(path)
    with pytest.raises(ConfigError, match=said):
        DiskTable(path, verify=True)
    capsys.readouterr()
    assert main(["verify", str(path)]) == 1
    assert said in capsys.readouterr().out


def test_a_file_without_checksums_is_opened_but_never_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, table = tmp_path / "table", MemoryTable(30, 4)
    save_file({"weight": table.weight.detach()}, path, {"rows": "float", "width": "4", "dtype": "F32"})
    with torch.no_grad():
        assert torch.equal(DiskTable(path)(torch.arange(30)), table.weight)
    with pytest.raises(ConfigError, match="has no checksums"):
        DiskTable(path, verify=True)
    assert main(["verify", str(path)]) == 2
    assert "has no checksums" in capsys.readouterr().err
    table.to_disk(path)  # it is a table of the same rows
    DiskTable(path, verify=True)


def test_places_that_no_file_can_have_are_refused_by_name(tmp_path: Path) -> None:
    table = MemoryTable(30, 4)
    (tmp_path / "file").write_text("something else")
    for path in (tmp_path / "file" / "x", tmp_path / ("x" * 300), tmp_path / "a\0b", Path()):
        with pytest.raises(ConfigError, match=r"cannot write|path is"):
            table.to_disk(path)
        with pytest.raises(ConfigError, match="no safetensors file"):
            DiskTable(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def memory_of_this_process(part: str) -> int:
    """Bytes, of `/proc/self/status`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(part))
    return int(line.split()[1]) * 1024


def sparse_table(path: Path, n_rows: int, width: int) -> None:
    """A file that has a table of zeros, and no blocks on the disk for it."""
    size = n_rows * width * 2
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [n_rows, width], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)


def test_20_gb_open_in_seconds_and_without_memory(tmp_path: Path) -> None:
    n_rows, width = 160_000_000, 64
    sparse_table(tmp_path / "table", n_rows, width)
    assert (tmp_path / "table").stat().st_size > 20e9
    before, began = memory_of_this_process("VmRSS"), time.perf_counter()
    table = DiskTable(tmp_path / "table", cache_rows=1000)
    with torch.no_grad():
        values = table(torch.randint(0, n_rows, (1, 64, 16)))
    assert time.perf_counter() - began < 5
    assert memory_of_this_process("VmRSS") - before < 200e6
    assert values.shape == (1, 64, 16, width)
    assert not values.any()


def read_and_report(
    path: Path, expected: Tensor, results: "multiprocessing.Queue[tuple[int, int, int]]", stay: object
) -> None:
    """Read a whole table in another process; tell the kilobytes that its mapping holds: all, shared, its own."""
    table = DiskTable(path)
    with torch.no_grad():
        assert torch.equal(table(torch.arange(len(expected))), expected)
    sums = dict.fromkeys(("Rss", "Shared_Clean", "Shared_Dirty", "Private_Clean", "Private_Dirty"), 0)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split()[0]:  # the next mapping
            inside = str(path) in line
        elif inside and name in sums:
            sums[name] += int(value.split()[0])
    results.put((sums["Rss"], sums["Shared_Clean"] + sums["Shared_Dirty"], sums["Private_Dirty"]))
    stay.wait(60)  # type: ignore[attr-defined]


def test_processes_share_what_is_in_memory_of_a_file(tmp_path: Path) -> None:
    table = MemoryTable(40_000, 32)
    path = tmp_path / "table"
    ours = table.to_disk(path)
    with torch.no_grad():
        ours(torch.arange(40_000))  # its pages are in this process, too
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[int, int, int]] = context.Queue()
    stay = context.Event()
    others = [
        context.Process(target=read_and_report, args=(path, table.weight.detach(), results, stay)) for _ in range(2)
    ]
    for process in others:
        process.start()
    try:
        for all_kb, shared_kb, own_kb in (results.get(timeout=60) for _ in others):
            assert all_kb >= 40_000 * 32 * 4 / 1024
            assert shared_kb == all_kb
            assert own_kb == 0
    finally:
        stay.set()
        for process in others:
            process.join()
