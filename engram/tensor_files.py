"""safetensors files that are mapped into memory, not held in it: made to be filled, or read when they are looked at.

The format (https://github.com/huggingface/safetensors): the length of a header, a header in JSON that says where each
tensor lies, then the tensors. The library writes only what is in memory, and its `safe_open` asks the kernel for as
much memory as the file is long: it refuses files larger than the machine's.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engram.config import ConfigError, require

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the library's own bound
_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap has the name from Python 3.13 on

Shapes = dict[str, tuple[torch.Size, torch.dtype]]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file, in bytes from the file's start, and what it is."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a file holds, in the order in which it lies there; the header itself ends where the first tensor starts."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def size_of(shape: torch.Size, dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return math.prod(shape) * dtype.itemsize


def create(path: Path, shapes: Shapes, metadata: dict[str, str]) -> dict[str, Tensor]:
    """Make a file for tensors of these shapes; the tensors lie in the mapped file, and what is written to them does.

    Raises `OSError` if the disk has no room for all of it: a process that writes to a mapped page without would die.
    Raises `ConfigError` naming a tensor that safetensors can't hold.
    """
    # Wide types first: then every tensor starts at a multiple of its numbers' size.
    names = sorted(shapes, key=lambda name: -shapes[name][1].itemsize)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        shape, dtype = shapes[name]
        require(dtype in _NAMES and min(shape, default=0) >= 0, name, (shape, dtype), "what safetensors can hold")
        start, end = end, end + size_of(shape, dtype)
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    size = 8 + len(text) + end
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        file.write(len(text).to_bytes(8, "little") + text)
    mapped = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    entries = read_header(path).entries
    return {name: mapped[at.start : at.end].view(at.dtype).view(at.shape) for name, at in entries.items()}


def map_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """A file's tensors. They are its own pages, read when they are first looked at; a page that is written to becomes
    this process's own, and the file stays as it is. The file must not be changed in its place meanwhile."""
    mapped = map_file(path)
    return {name: _tensor_at(mapped, entry) for name, entry in header.entries.items()}


def map_file(path: Path) -> mmap.mmap:
    """A file's pages, read when they are first looked at; one that is written to becomes this process's own."""
    with path.open("rb") as file:
        if sys.platform == "linux":
            # Not to reserve memory for the case that every page is written to: tables may be larger than memory is.
            flags, access = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(file.fileno(), 0, flags, access)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _tensor_at(mapped: mmap.mmap, at: Entry) -> Tensor:
    """A tensor with a storage of its own, so that a copy of it copies nothing else of the file."""
    if at.end == at.start:
        return torch.empty(at.shape, dtype=at.dtype)
    raw = torch.frombuffer(mapped, dtype=torch.uint8, count=at.end - at.start, offset=at.start)
    aligned = at.start % at.dtype.itemsize == 0  # other programs may write it in another way
    return (raw if aligned else raw.clone()).view(at.dtype).view(at.shape)


def header_bytes(path: Path) -> bytes:
    """A file up to its first tensor. Raises `ConfigError` naming the file if it ends before that."""
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        text = file.read(length) if length <= _MAX_HEADER else b""
    if len(prefix) < 8 or len(text) < length:
        raise ConfigError(f"{path.name}: its header is cut off or damaged")
    return prefix + text


def read_header(path: Path) -> Header:
    """Where a file's tensors lie. Raises `ConfigError` naming the file, and the first tensor that isn't there whole."""
    raw = header_bytes(path)
    try:
        listed = json.loads(raw[8:])
        metadata = dict(listed.pop("__metadata__", {}))
        entries = {name: _entry(described, len(raw)) for name, described in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ConfigError(f"{path.name}: its header is damaged: {type(error).__name__} {error}") from error
    end, size = len(raw), path.stat().st_size
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    for name, entry in entries.items():
        if entry.start != end or entry.end - entry.start != size_of(entry.shape, entry.dtype):
            raise ConfigError(f"{path.name}: its header is damaged: {name} does not lie where the one before it ends")
        end = entry.end
        if end > size:
            raise ConfigError(f"{path.name} is cut off: {name} ends at byte {end}, the file at {size}")
    if size > end:
        raise ConfigError(f"{path.name}: its last tensor ends at byte {end}, the file at {size}")
    return Header(entries, metadata)


def _entry(described: dict[str, Any], begin: int) -> Entry:
    start, end = described["data_offsets"]
    shape = described["shape"]
    if not all(type(number) is int and 0 <= number < 2**63 for number in (start, end, *shape)):
        raise ValueError(f"shape {shape}, offsets {[start, end]}")
    return Entry(_DTYPES[described["dtype"]], torch.Size(shape), start + begin, end + begin)


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor, from the index of a folder of several.

    Raises `ConfigError` naming it if it can't be read, or leads out of its folder.
    """
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(name, str) and Path(name).name == name for name in files.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{str(index)!r} can't be read as an index of weights: {error!r}") from error
    require(plain, f"{str(index)!r}: weight_map", "a path", "names of files in the same folder")
    return dict(files)
