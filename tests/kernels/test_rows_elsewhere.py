"""Rows picked from a cache or a table, and rows of mapped files, against indexing; and what is read of a file."""

import ctypes
import mmap
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engram.kernels import gather_mapped, load_native, pick_rows
from engram.memory import DiskTable, MemoryTable


@pytest.mark.parametrize("n_cached", [1, 9])
def test_rows_come_from_the_cache_where_it_has_them(n_cached: int) -> None:
    table = torch.randint(0, 255, (50, 6), dtype=torch.uint8)
    cache = torch.randint(0, 255, (n_cached, 6), dtype=torch.uint8)
    rows, slots = torch.randint(0, 50, (3, 40)), torch.randint(-1, n_cached, (3, 40))
    picked = pick_rows(cache, slots, table, rows)
    for at in [(i, j) for i in range(3) for j in range(40)]:
        slot = int(slots[at])
        assert torch.equal(picked[at], cache[slot] if slot >= 0 else table[int(rows[at])])
    nothing = torch.empty(0, 6, dtype=torch.uint8)
    assert torch.equal(pick_rows(cache, torch.zeros(4, dtype=torch.int64), nothing, rows[0, :4]), cache[[0] * 4])
    torch.library.opcheck(torch.ops.engram.pick_rows.default, (cache, slots, table, rows))


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    load_native()


def pages_in_memory(records: Tensor) -> list[bool]:
    """Which pages of a mapped tensor the system holds (mincore)."""
    first = records.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    n = -(-(records.data_ptr() + records.numel() - first) // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * n)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(n * mmap.PAGESIZE), found) == 0
    return [bool(page & 1) for page in found]


def test_only_the_pages_of_rows_that_are_read_come_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "table"
    MemoryTable(64 * 512, 16).to_disk(path)  # 64 rows to a page
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    table = DiskTable(path)
    # The first few come with the header.
    later = lambda: [i for i, there in enumerate(pages_in_memory(table.records)) if there and i >= 64]  # noqa: E731
    if later():
        pytest.skip("a file system that keeps files in memory")
    with torch.no_grad():
        table(torch.tensor([64 * 70 + 3, 64 * 70 + 60, 64 * 71, 64 * 300 + 63]))
    assert later() == [70, 71, 300]


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 129, 6000])
@pytest.mark.parametrize("cold", [True, False])
def test_rows_of_a_mapped_file_are_its_lines_in_memory_or_not(n: int, cold: bool, tmp_path: Path) -> None:
    table = torch.randint(0, 255, (20_000, 96), dtype=torch.uint8)
    table.numpy().tofile(tmp_path / "table")
    with (tmp_path / "table").open("rb") as file:
        os.fsync(file.fileno())
        if cold:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    records = torch.frombuffer(mapped, dtype=torch.uint8).view(20_000, 96)
    rows = torch.randint(0, 20_000, (n,)).sort().values
    assert torch.equal(gather_mapped(records, rows), table[rows])
    torch.library.opcheck(torch.ops.engram.gather_mapped.default, (table, rows))
    for beyond in (-1, 20_000):
        with pytest.raises(IndexError, match=f"{beyond}"):
            gather_mapped(records, torch.tensor([3, beyond]))
