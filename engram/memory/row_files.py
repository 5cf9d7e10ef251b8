"""Rows in a file, mapped into memory and never loaded: several processes share what the system keeps of it.

Files have the layout of safetensors (8 bytes that give the header's length, a header in JSON, then the numbers), so
that the table inside a saved model is served from where it lies and a table that is written here opens anywhere. The
header of one that is written here has SHA-256 of itself and of each 64 MiB of rows.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engram.config import ConfigError, require
from engram.digests import BLOCK, CHECKED_BYTES, Advance, Digests, digests, where_they_differ
from engram.memory.row_formats import FloatRows, RowFormat, row_format
from engram.tensor_files import Header, header_bytes, map_file, read_header

_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PAGE = 4096
_CHECKED = {"header_sha256", "blocks_sha256"}  # in a header's metadata: of all else in the header, and of the rows


class RowFile(NamedTuple):
    """Records `[R, S]` (uint8) that lie in a file, and their format. What is written to them stays in this process."""

    records: Tensor
    format: RowFormat


def write_rows(path: Path, parts: Iterable[Tensor], n_rows: int, fmt: RowFormat) -> None:
    """Write records `[*, S]` (uint8), part by part, to a file that takes its name when it is whole, with checksums.

    Raises `ConfigError` if there is something else than a table of the same rows, or the disk refuses.
    """
    ours = {"rows": fmt.kind, "width": str(fmt.width), "dtype": _name(fmt.dtype)}
    floats = isinstance(fmt, FloatRows)
    shape, dtype = ([n_rows, fmt.width], _name(fmt.dtype)) if floats else ([n_rows, fmt.row_bytes], "U8")
    size, seen = n_rows * fmt.row_bytes, Digests()
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    draft = path.parent / f".{path.name}.{os.getpid()}.draft"
    try:
        allowed = not path.exists() or _is_table(path, ours, n_rows)
        require(allowed, "path", str(path), f"free, or a table of {n_rows} rows to replace ({ours})")
        path.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file, ThreadPoolExecutor(1) as beside:
            file.write(_signed(ours, entry, ["0" * 64] * -(-size // BLOCK)))  # the room that it will take
            for part in parts:
                data = part.cpu().reshape(-1).numpy().data
                hashed = beside.submit(seen.update, data)
                file.write(data)
                hashed.result()
            file.seek(0)
            file.write(_signed(ours, entry, seen.all()))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ConfigError(f"cannot write {str(path)!r}: {error}") from error
    finally:
        with suppress(OSError, ValueError):
            draft.unlink()


def map_rows(path: Path, name: str = "weight", verify: bool = False) -> RowFile:
    """The table `name` of a safetensors file: no more of it is read than its rows that are, once it is checked.

    A table that `write_rows` wrote is compared with its checksums: whole if it has up to 1 GiB or `verify` says so, or
    its header alone. Others have none.

    Raises `ConfigError` for a file that is none, is cut short or damaged, or holds no such table, and with `verify` for
    one without checksums.
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
    if verify or _CHECKED & header.metadata.keys():
        found = list(_damages(path, header, verify or entry.end - entry.start <= CHECKED_BYTES))
        if found:
            raise ConfigError("; ".join(found))
    n_bytes = width * entry.dtype.itemsize
    require(n_bytes == fmt.row_bytes, f"bytes in a row of {name} of {str(path)!r}", n_bytes, f"{fmt.row_bytes}")
    require(entry.end > entry.start, f"size of {name} in {str(path)!r}", list(entry.shape), "a row or more")
    mapped = map_file(path)
    # Or the system would read 128 KB around each row.
    mapped.madvise(mmap.MADV_RANDOM)
    flat = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start)
    return RowFile(flat.view(n_rows, fmt.row_bytes), fmt)


def verify_rows(path: Path, advance: Advance | None = None) -> list[str]:
    """What is damaged in a table that `write_rows` wrote, a line each; nothing if all is well.

    `advance` is told of bytes as they are read, by several threads. Raises `ConfigError` for a file that is none, is
    cut short or has no checksums.
    """
    return list(_damages(path, _header(path), True, advance))


def _signed(ours: dict[str, str], entry: dict[str, Any], blocks: list[str]) -> bytes:
    """The beginning of a file, up to its rows, which begin with a page."""
    ours = ours | {"blocks_sha256": " ".join(blocks)}
    described = {"__metadata__": ours | {"header_sha256": _sha256(ours, entry)}, "weight": entry}
    text = json.dumps(described).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    return len(text).to_bytes(8, "little") + text


def _damages(path: Path, header: Header, whole: bool, advance: Advance | None = None) -> Iterator[str]:
    """What is wrong with a file, by the checksums that are in its header."""
    ours, entry = header.metadata, header.entries.get("weight")
    if entry is None or not _CHECKED & ours.keys():
        raise ConfigError(f"{str(path)!r} has no checksums of its rows: `to_disk` writes some")
    described = json.loads(header_bytes(path)[8:])["weight"]
    own = {name: value for name, value in ours.items() if name != "header_sha256"}
    expected = str(own.get("blocks_sha256")).split()
    n_blocks = -(-(entry.end - entry.start) // BLOCK)
    if _sha256(own, described) != ours.get("header_sha256") or len(expected) != n_blocks:
        yield f"{str(path)!r}: its header is damaged, its SHA-256 is not the one in it"
    elif whole:
        found = digests(path, {"weight": (entry.start, entry.end)}, advance)["weight"]
        where = where_they_differ(found, expected)
        if where is not None:
            yield f"{str(path)!r}: its rows are damaged{where}, their SHA-256 is not that in the header"


def _sha256(ours: dict[str, str], entry: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([ours, entry]).encode()).hexdigest()


def _is_table(path: Path, ours: dict[str, str], n_rows: int) -> bool:
    """Whether there is a table of so many rows and this format."""
    try:
        there = _header(path)
        own = {name: value for name, value in there.metadata.items() if name not in _CHECKED}
        return own == ours and there.entries["weight"].shape[0] == n_rows
    except (ConfigError, KeyError):
        return False


def _header(path: Path) -> Header:
    try:
        return read_header(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} is no safetensors file that can be read: {error}") from error


def _name(dtype: torch.dtype) -> str:
    return next(name for name, kind in _TYPES.items() if kind == dtype)
