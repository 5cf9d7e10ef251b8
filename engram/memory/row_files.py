"""Rows in a file, mapped into memory and never loaded: several processes share what the system keeps of it.

Files have the layout of safetensors (8 bytes that give the header's length, a header in JSON, then the numbers), so
that the table inside a saved model is served from where it lies and a table that is written here opens anywhere.
"""

from __future__ import annotations

import json
import mmap
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engram.config import ConfigError, require
from engram.memory.row_formats import FloatRows, RowFormat, row_format

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PAGE = 4096
_LONGEST_HEADER = 100 * 2**20  # as in safetensors: what says more is no such file


class RowFile(NamedTuple):
    """Records `[R, S]` (uint8) that lie in a file and must not be written to, and their format."""

    records: Tensor
    format: RowFormat


def write_rows(path: Path, parts: Iterable[Tensor], n_rows: int, fmt: RowFormat) -> None:
    """Write records `[*, S]` (uint8), part by part, to a file that takes its name when it is whole.

    Raises `ConfigError` if there is something else than a table of the same rows, or the disk refuses.
    """
    ours = {"rows": fmt.kind, "width": str(fmt.width), "dtype": _name(fmt.dtype)}
    if path.exists():
        try:
            there = _header(path)[0]
            same = there.get("__metadata__") == ours and there["weight"]["shape"][0] == n_rows
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
    header, start = _header(path)
    names = sorted(key for key in header if key != "__metadata__")[:20]
    require(name in header, "table", name, f"one of {names} in {str(path)!r}")
    entry = header[name]
    try:
        dtype, shape = entry["dtype"], entry["shape"]
        first, last = (start + int(offset) for offset in entry["data_offsets"])
        n_rows, width = (int(size) for size in shape)
        if dtype in _TYPES:
            fmt: RowFormat = FloatRows(width, _TYPES[dtype])
        else:
            ours = header["__metadata__"]
            fmt = row_format(ours["rows"], int(ours["width"]), _TYPES[ours["dtype"]])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{str(path)!r}: {name!r} is no table of rows: {entry}") from error
    whole = fmt.row_bytes * n_rows == last - first and (dtype in _TYPES or width == fmt.row_bytes)
    require(whole, f"{name} of {str(path)!r}", entry, f"{n_rows} rows of {fmt.row_bytes} bytes each")
    size = path.stat().st_size
    require(size >= last, f"size of {str(path)!r}", size, f"{last} bytes or more: the file is cut short")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), last, mmap.MAP_SHARED, mmap.PROT_READ)
    # Or the system would read 128 KB around each row.
    mapped.madvise(mmap.MADV_RANDOM)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        flat = torch.frombuffer(mapped, dtype=torch.uint8, count=last - first, offset=first)
    return RowFile(flat.view(n_rows, fmt.row_bytes), fmt)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A file's header, and where its numbers begin."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("a header that is no object")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} is no safetensors file that can be read: {error}") from error
    return header, 8 + length


def _name(dtype: torch.dtype) -> str:
    return next(name for name, kind in _TYPES.items() if kind == dtype)
