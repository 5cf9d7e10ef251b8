"""Rows in a file, mapped into memory and never loaded: several processes share what the system keeps of it.

Files have the layout of safetensors (8 bytes that give the header's length, a header in JSON, then the numbers), so
that the table inside a saved model is served from where it lies and a table that is written here opens anywhere.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engram.config import ConfigError, require
from engram.memory.row_formats import FloatRows, RowFormat, row_format
from engram.tensor_files import Header, map_file, read_header

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PAGE = 4096


class RowFile(NamedTuple):
    """Records `[R, S]` (uint8) that lie in a file, and their format. What is written to them stays in this process."""

    records: Tensor
    format: RowFormat


def write_rows(path: Path, parts: Iterable[Tensor], n_rows: int, fmt: RowFormat) -> None:
    """Write records `[*, S]` (uint8), part by part, to a file that takes its name when it is whole.

    Raises `ConfigError` if there is something else than a table of the same rows, or the disk refuses.
    """
    ours = {"rows": fmt.kind, "width": str(fmt.width), "dtype": _name(fmt.dtype)}
    if path.exists():
        try:
            there = _header(path)
            same = there.metadata == ours and there.entries["weight"].shape[0] == n_rows
        except (ConfigError, KeyError):
            same = False
        require(same, "path", str(path), f"free, or a table of {n_rows} rows to replace ({ours})")
    floats = isinstance(fmt, FloatRows)
    shape, dtype = ([n_rows, fmt.width], _name(fmt.dtype)) if floats else ([n_rows, fmt.row_bytes], "U8")
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, n_rows * fmt.row_bytes]}
    header = json.dumps({"__metadata__": ours, "weight": entry}).encode()
    header += b" " * (-(8 + len(header)) % _PAGE)  # rows begin with a page
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for part in parts:
                file.write(part.cpu().contiguous().numpy().data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def map_rows(path: Path, name: str = "weight") -> RowFile:
    """The table `name` of a safetensors file: nothing of it is read before its rows are.

    Raises `ConfigError` for a file that is none, is cut short, or holds no such table.
    """
    header = _header(path)
    names = sorted(header.entries)[:20]
    require(name in header.entries, "table", name, f"one of {names} in {str(path)!r}")
    entry = header.entries[name]
    try:
        n_rows, width = entry.shape
        if entry.dtype in _TYPES.values():
            fmt: RowFormat = FloatRows(width, entry.dtype)
        else:
            ours = header.metadata
            fmt = row_format(ours["rows"], int(ours["width"]), _TYPES[ours["dtype"]])  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{str(path)!r}: {name!r} is no table of rows: {entry}") from error
    n_bytes = width * entry.dtype.itemsize
    require(n_bytes == fmt.row_bytes, f"bytes in a row of {name} of {str(path)!r}", n_bytes, f"{fmt.row_bytes}")
    require(entry.end > entry.start, f"size of {name} in {str(path)!r}", list(entry.shape), "a row or more")
    mapped = map_file(path)
    # Or the system would read 128 KB around each row.
    mapped.madvise(mmap.MADV_RANDOM)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start)
    return RowFile(flat.view(n_rows, fmt.row_bytes), fmt)


def _header(path: Path) -> Header:
    try:
        return read_header(path)
    except (ConfigError, OSError) as error:
        raise ConfigError(f"{str(path)!r} is no safetensors file that can be read: {error}") from error


def _name(dtype: torch.dtype) -> str:
    return next(name for name, kind in _TYPES.items() if kind == dtype)
