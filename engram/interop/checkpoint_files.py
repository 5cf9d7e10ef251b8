"""The tensors of a checkpoint folder: one safetensors file, or many with an index, of which headers alone are read.

Tensors are read when they are asked for, straight into the memory that is to hold them. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engram.config import ConfigError, require
from engram.parallel.consolidate import INDEX, WEIGHTS
from engram.tensor_files import Entry, read_header, read_index

_CHUNK_BYTES = 2**26


class Stored(NamedTuple):
    """A tensor's file, and where it lies in it."""

    path: Path
    entry: Entry

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.entry.shape)

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return self.entry.end - self.entry.start


class TensorFiles:
    """The tensors of a folder by name.

    Raises:
        ConfigError: naming the folder or the file, if there is no `model.safetensors` or index, or it can't be read;
            naming file and tensor, if one that is asked for is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._headers: dict[str, dict[str, Entry]] = {}
        index, single = self.folder / INDEX, self.folder / WEIGHTS
        if index.exists():
            self._listed_in = index
            self._file_of = read_index(index)
        else:
            require(single.exists(), "checkpoint", str(folder), f"a folder with {WEIGHTS} or {INDEX}")
            self._listed_in = single
            self._file_of = dict.fromkeys(self._header(WEIGHTS), WEIGHTS)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def stored(self, name: str) -> Stored:
        """Where a tensor lies."""
        if name not in self._file_of:
            raise ConfigError(f"{str(self._listed_in)!r} lacks the tensor {name}")
        header = self._header(self._file_of[name])
        if name not in header:
            path = self.folder / self._file_of[name]
            raise ConfigError(f"{str(path)!r} lacks the tensor {name}, which {INDEX} says is there")
        return Stored(self.folder / self._file_of[name], header[name])

    def expect(self, name: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Stored:
        """As `stored`. Raises `ConfigError` naming file and tensor, found and expected, for another shape or type."""
        found = self.stored(name)
        where = f"{str(found.path)!r}: tensor {name}: "
        require(found.shape == shape, where + "shape", list(found.shape), str(list(shape)))
        if dtypes:
            require(found.dtype in dtypes, where + "type", found.dtype, " or ".join(map(str, dtypes)))
        return found

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        found = self.stored(name)
        tensor = torch.empty(found.shape, dtype=found.dtype)
        self.read_into(name, tensor)
        return tensor

    def read_into(self, name: str, out: Tensor, first_row: int = 0) -> None:
        """Fill a contiguous tensor of the type that is stored with as many rows as it has, from `first_row` on."""
        found = self.stored(name)
        assert out.dtype == found.dtype
        assert first_row * _row_bytes(found) + out.nbytes <= found.n_bytes
        with found.path.open("rb") as file:
            file.seek(found.entry.start + first_row * _row_bytes(found))
            file.readinto(out.detach().view(-1).view(torch.uint8).numpy().data)

    def chunks(self, name: str, rows: int = 0) -> Iterator[tuple[int, Tensor]]:
        """A tensor's rows in turn, each time the first one's number and some of them: `rows`, or about 64 MiB if 0."""
        found = self.stored(name)
        rows = rows or max(1, _CHUNK_BYTES // max(1, _row_bytes(found)))
        for first in range(0, found.shape[0], rows):
            chunk = torch.empty((min(rows, found.shape[0] - first), *found.shape[1:]), dtype=found.dtype)
            self.read_into(name, chunk, first)
            yield first, chunk

    def _header(self, file: str) -> dict[str, Entry]:
        if file not in self._headers:
            try:
                self._headers[file] = read_header(self.folder / file).entries
            except (OSError, ValueError) as error:  # no file's name, or no header
                raise ConfigError(f"{str(self.folder / file)!r} can't be read as safetensors: {error}") from error
        return self._headers[file]


def write_rows(folder: Path, stored: Stored, rows: Tensor, first_row: int = 0) -> None:
    """Put rows, in the type that is stored, in the place of a tensor's own in `folder`'s copy of its file."""
    assert rows.dtype == stored.dtype
    assert first_row * _row_bytes(stored) + rows.nbytes <= stored.n_bytes
    with (folder / stored.path.name).open("r+b") as file:
        file.seek(stored.entry.start + first_row * _row_bytes(stored))
        file.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)


def _row_bytes(stored: Stored) -> int:
    return stored.n_bytes // stored.shape[0] if stored.shape and stored.shape[0] else stored.n_bytes
