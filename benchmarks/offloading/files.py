"""Files of tables: a folder that is removed, what the system holds of a file, and a sparse file beyond memory."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from engram.memory import DiskTable
from engram.memory.row_formats import FloatRows

PAGE = mmap.PAGESIZE


@contextmanager
def space(folder: str | None) -> Iterator[Path]:
    """A folder for files of tables, which is removed."""
    path = Path(tempfile.mkdtemp(prefix="engram-tables-", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def advise(memory: Tensor, advice: int) -> None:
    """Tell the system how the pages of a tensor are used (madvise)."""
    libc, address = ctypes.CDLL(None, use_errno=True), memory.data_ptr()
    first = address // PAGE * PAGE
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(address + memory.nbytes - first), advice):
        raise OSError(ctypes.get_errno(), "madvise")


def forget(tables: Sequence[DiskTable]) -> None:
    """Let the system drop what it holds of a file: from this process, which has it mapped for each table, and all."""
    for table in tables:
        advise(table.records, mmap.MADV_DONTNEED)
    with tables[0].path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def recall(tables: Sequence[DiskTable]) -> None:
    """Read a file, so that the system holds all of it."""
    with tables[0].path.open("rb", buffering=0) as file:
        buffer = bytearray(2**24)
        while file.readinto(buffer):
            pass


def sparse_file(path: Path, fmt: FloatRows, n_rows: int, rows: Tensor) -> int:
    """A file of a table with data in the pages of `rows` alone; how many bytes those are."""
    size = n_rows * fmt.row_bytes
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [n_rows, fmt.width], "data_offsets": [0, size]}}).encode()
    header += b" " * (-(8 + len(header)) % PAGE)
    start = 8 + len(header)
    per_page = PAGE // fmt.row_bytes + 2
    data = [fmt.encode(0.02 * torch.randn(per_page, fmt.width)).numpy().tobytes()[:PAGE] for _ in range(64)]
    first, last = (start + rows * fmt.row_bytes) // PAGE, (start + (rows + 1) * fmt.row_bytes - 1) // PAGE
    pages = torch.cat([first, last]).unique().tolist()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(start + size)
        for i, page in enumerate(pages):
            os.pwrite(file.fileno(), data[i % 64], page * PAGE)
        file.truncate(start + size)
        os.fsync(file.fileno())
    return len(pages) * PAGE
