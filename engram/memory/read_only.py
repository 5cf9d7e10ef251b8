"""Tables that are only read: rows as records of bytes, as they are or quantized, in the place of a `MemoryTable`.

No such table is ever frozen silently: reading it while gradients are recorded is refused until it is told
`requires_grad_(False)`. Here the rows lie where they are used; offloaded.py has those that lie elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from engram.config import ConfigError, require
from engram.kernels import gather_rows, load_kernels
from engram.memory.row_files import write_rows
from engram.memory.row_formats import FloatRows, RowFormat, RowKind, row_format
from engram.memory.table import MemoryTable, register

if TYPE_CHECKING:
    from engram.memory.offloaded import DiskTable, HostTable

_PART = 2**24  # numbers that are converted at a time
_CPU = torch.device("cpu")


class ReadOnlyTable(MemoryTable):
    """Rows that are only read; they lie on the device, and move with the model.

    There are no parameters. The state dict has the records, as `weight` where rows are floats and as `records` where
    they are quantized: the rows themselves, not a copy. It can be loaded where its rows are those of the table; to
    have others, make the table anew.

    Args:
        records: `[R, S]`, uint8.
        fmt: what makes values of them.
    """

    def __init__(self, records: Tensor, fmt: RowFormat) -> None:
        nn.Module.__init__(self)
        load_kernels()
        self.records, self.format = records, fmt
        self.learns = True
        self._enter()

    @property
    def n_rows(self) -> int:
        """Rows of the table."""
        return len(self.records)

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self.format.width

    @property
    def dtype(self) -> torch.dtype:
        """Type of the values that are read."""
        return self.format.dtype

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """False: the rows may be read while gradients are recorded, and stay as they are."""
        self.learns = requires_grad
        return self

    def forward(self, rows: Tensor) -> Tensor:
        """Rows `[..., H]` (int64 indices) -> their values `[..., H, width]`.

        Raises `ConfigError` where a `MemoryTable` would record a gradient.
        """
        return self.start(rows)()

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        """As `MemoryTable.start`; raises as `forward`."""
        self._refuse_to_learn()
        return partial(self._values, rows)

    def read_only(self, rows: RowKind = "float") -> ReadOnlyTable:
        """As `MemoryTable.read_only`; `float` keeps rows as they are. Raises `ConfigError` for rows that are quantized
        already and asked for in another format."""
        fmt = self._format_for(rows)
        return ReadOnlyTable(self._encoded(fmt, self.records.device), fmt).requires_grad_(self.learns)

    def to_host(self, pinned: bool = True, cache_rows: int = 0, rows: RowKind = "float") -> HostTable:
        """As `MemoryTable.to_host`; rows as in `read_only`."""
        from engram.memory.offloaded import HostTable

        self._require_rows()
        fmt = self._format_for(rows)
        return HostTable(self._encoded(fmt, _CPU), fmt, cache_rows, pinned).requires_grad_(self.learns)

    def to_disk(self, path: str | Path, cache_rows: int = 0, rows: RowKind = "float") -> DiskTable:
        """As `MemoryTable.to_disk`; rows as in `read_only`."""
        from engram.memory.offloaded import DiskTable

        self._require_rows()
        fmt = self._format_for(rows)
        write_rows(Path(path), self._parts(fmt), self.n_rows, fmt)
        return DiskTable(path, cache_rows).requires_grad_(self.learns)

    def reset_parameters(self) -> None:
        """Raises `ConfigError`."""
        raise ConfigError("a read-only table cannot be drawn anew")

    def extra_repr(self) -> str:
        return f"n_rows={self.n_rows}, width={self.width}, dtype={self.dtype}, rows={self.format.kind}"

    def _values(self, rows: Tensor) -> Tensor:
        return self.format.decode(gather_rows(self.records, rows))

    def _require_rows(self) -> None:
        require(not self.records.is_meta, "device of the table", "meta", "one where it has rows: load or draw them")

    def _format_for(self, rows: RowKind) -> RowFormat:
        fmt = row_format(rows, self.width, self.dtype)
        if rows in ("float", self.format.kind):
            return self.format
        require(isinstance(self.format, FloatRows), "rows", rows, f"float, to keep the {self.format.kind} they are in")
        return fmt

    def _encoded(self, fmt: RowFormat, device: torch.device) -> Tensor:
        """The records in a format, on a device; the same ones if they are that already."""
        if fmt == self.format:
            return self.records.to(device)
        result = self.records.new_empty(self.n_rows, fmt.row_bytes, device=device)
        for part, place in zip(self._parts(fmt), result.split(self._part), strict=True):
            place.copy_(part)
        return result

    def _parts(self, fmt: RowFormat) -> Iterator[Tensor]:
        """The records in a format, in parts that take little memory."""
        for part in self.records.split(self._part):
            yield part if fmt == self.format else fmt.encode(self.format.decode(part))

    @property
    def _part(self) -> int:
        return max(_PART // self.width, 1)

    def _refuse_to_learn(self) -> None:
        if torch.is_grad_enabled() and self.learns:
            raise ConfigError(
                f"{type(self).__name__} is read-only, its rows get no gradient: read it under torch.no_grad(), or call "
                "requires_grad_(False) on the table to train all else with these rows frozen"
            )

    def _enter(self) -> None:
        self._number = register(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Of whole numbers, so that a change of type leaves them; but that of `type`, which is for all tensors.
        if fn(self.records[:0]).dtype == self.records.dtype:
            self.records = fn(self.records)
        return self

    def _saved(self) -> tuple[str, Tensor]:
        """What the state dict has, and under which name."""
        floats = isinstance(self.format, FloatRows)
        return ("weight", self.records.view(self.dtype)) if floats else ("records", self.records)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        name, rows = self._saved()
        destination[prefix + name] = rows

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = prefix + self._saved()[0]
        if strict:
            missing_keys += [name] if name not in state_dict else []
            unexpected_keys += [key for key in state_dict if key.startswith(prefix) and key != name]
        if name in state_dict and not self._has(state_dict[name]):
            error_msgs.append(f"{name}: a read-only table takes no other rows")

    def _has(self, saved: Tensor) -> bool:
        """Whether its rows are these, compared in parts that take little memory."""
        _, ours = self._saved()
        if saved.shape != ours.shape or saved.data_ptr() == ours.data_ptr():
            return saved.shape == ours.shape
        pairs = zip(ours.split(self._part), saved.split(self._part), strict=True)
        # As bytes, for NaN is not equal to itself.
        return all(torch.equal(a.view(torch.uint8), b.to(a).contiguous().view(torch.uint8)) for a, b in pairs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        # Rows that nobody changes are shared.
        other.__setstate__({key: copy.copy(x) if isinstance(x, dict) else x for key, x in self.__dict__.items()})
        return other
