"""The tensors of a model and its optimisers by the names they have in a checkpoint, whatever the mesh.

Dense parameters are DTensors of FSDP2 and experts become DTensors of all experts, so that
`torch.distributed.checkpoint` finds each process's part. Rows of a table come in pieces that say which rows they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from engram.config import require
from engram.memory import MemoryTable, ReadOnlyTable
from engram.parallel.experts import ShardedExperts
from engram.parallel.table import ShardedTable

# Of a table that is written, or read, at a time: there is never a second copy of much of it, nor too many pieces.
_PIECE_BYTES, _PIECES = 2**21, 256
_PIECE = re.compile(r"(?P<name>.+)/rows-(?P<first>\d+)-every-(?P<stride>\d+)-from-(?P<start>\d+)")


class Piece(NamedTuple):
    """Some rows of a table: `first + stride * (start + k)` for k from 0 on."""

    name: str
    first: int
    stride: int
    start: int

    def __str__(self) -> str:
        return f"{self.name}/rows-{self.first}-every-{self.stride}-from-{self.start}"

    @classmethod
    def parse(cls, entry: str) -> Piece | None:
        """From an entry's name; None if it is no piece of a table."""
        found = _PIECE.fullmatch(entry)
        return found and cls(found["name"], *(int(found[key]) for key in ("first", "stride", "start")))

    def rows(self, count: int) -> Tensor:
        """The numbers of its `count` rows, `[count]`."""
        return self.first + self.stride * torch.arange(self.start, self.start + count)


class Owned(NamedTuple):
    """A parameter as it lies in this process, and the module it belongs to."""

    module: nn.Module
    value: Tensor

    @property
    def rows(self) -> tuple[int, int] | None:
        """The first row and the stride of a table's rows here; None if it is no table's."""
        if isinstance(self.module, ShardedTable):
            return self.module.rank, self.module.n_shards
        return (0, 1) if isinstance(self.module, MemoryTable) else None


def parameters_of(model: nn.Module) -> dict[str, Owned]:
    """The parameters of a model by name, as their optimisers know them.

    Raises `ConfigError` for a read-only table, of whose rows a checkpoint would know nothing.
    """
    for name, module in model.named_modules():
        require(
            not isinstance(module, ReadOnlyTable),
            name,
            type(module).__name__,
            "a MemoryTable in a checkpoint: offload or quantize after loading, write such a model by save_model",
        )
        if isinstance(module, FSDPModule):
            module.reshard()  # a root keeps whole parameters after a forward pass that no backward pass follows
    return {
        f"{prefix}.{name}" if prefix else name: Owned(module, value)
        for prefix, module in model.named_modules()
        for name, value in module.named_parameters(recurse=False)
    }


def optimizer_state(parameter: Tensor, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
    """What the optimisers keep of a parameter; empty if nothing."""
    return next((dict(o.state[parameter]) for o in optimizers if parameter in o.state), {})


def entries(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """All tensors of a model, `model.NAME`, and its optimisers, `optimizer.NAME.KEY`, which share their memory.

    Raises as `parameters_of`.
    """
    result = {f"model.{name}": value for name, value in _persistent_buffers(model)}
    for name, owned in parameters_of(model).items():
        states = {f"optimizer.{name}.{key}": v for key, v in optimizer_state(owned.value, optimizers).items()}
        for entry, value in {f"model.{name}": owned.value, **states}.items():
            if isinstance(value, Tensor):
                result.update(_parts(entry, owned, value.detach()))
    return result


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for name, value in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", value


def pieces_of(name: str, first: int, stride: int, rows: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Rows `first + stride * i` of a table, `[count, S]`, some at a time, with the names of the pieces."""
    each = max(_PIECE_BYTES // (rows.shape[1] * rows.element_size()), len(rows) // _PIECES, 1)
    for start in range(0, len(rows), each):
        yield str(Piece(name, first, stride, start)), _alone(rows[start : start + each])


def _alone(part: Tensor) -> Tensor:
    """The same memory as a tensor that knows of no more: of one that does, torch would write a copy."""
    if part.device.type != "cpu":
        return part
    return torch.from_numpy(part.view(torch.uint8).numpy()).view(part.dtype)


def _parts(entry: str, owned: Owned, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if value.ndim and owned.rows is not None:
        yield from pieces_of(entry, *owned.rows, value)
    elif value.ndim and isinstance(owned.module, ShardedExperts):
        yield entry, owned.module.of_all(value)
    else:
        yield entry, value
