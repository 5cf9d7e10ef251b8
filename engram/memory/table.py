"""Where memory rows live and how they are fetched: one contiguous table for all hash heads of a layer.

Only rows that were read get a gradient (a sparse COO tensor), so that neither backward nor the optimiser's step does
work in proportion to the table. Source: arXiv:2601.07372, sections 2.1 and 2.5.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from engram.config import require
from engram.kernels import gather_rows, load_kernels
from engram.kernels.library import define, differentiate
from engram.kernels.random import fill_normal_
from engram.memory.row_formats import FloatRows, RowKind

if TYPE_CHECKING:
    from engram.memory.offloaded import DiskTable, HostTable
    from engram.memory.read_only import ReadOnlyTable


class MemoryTable(nn.Module):
    """A `[n_rows, width]` table, read by row index; it knows how rows are stored, not who asks.

    Rows start as N(0, std^2), drawn for each row by its number. The demonstration code has nn.Embedding's N(0, 1); rows
    that are never trained then add noise that hides what trained rows say, and small models learn markedly slower.

    Rows and their gradients have one type, `dtype`, whatever the type of the layers around. The many gradients that a
    bfloat16 row may get in a batch are summed in float32 (`combine_rows`).

    Under `torch.compile` the gradient is put into `weight.grad` by the backward pass itself, since compiled graphs
    can't carry sparse tensors: it is there for optimisers and clipping, but `torch.autograd.grad` and hooks don't see
    it.

    Args:
        n_rows, width: size of the table.
        dtype: torch's default if None. `to`, `float` and their like change it, as that of any weight.
        std: standard deviation of rows at the start.

    Raises:
        ConfigError: `n_rows` or `width` below 1.
    """

    def __init__(self, n_rows: int, width: int, dtype: torch.dtype | None = None, std: float = 0.02) -> None:
        super().__init__()
        load_kernels()
        require(n_rows >= 1, "n_rows", n_rows, "1 or more")
        require(width >= 1, "width", width, "1 or more")
        self.std = std
        self.weight = nn.Parameter(torch.empty(n_rows, width, dtype=dtype))
        self.reset_parameters()
        self._enter()

    def reset_parameters(self) -> None:
        """Draw all rows anew."""
        if not self.weight.is_meta:
            self._fill(int(torch.randint(2**32, (), device="cpu")))

    def _fill(self, seed: int) -> None:
        fill_normal_(self.weight, self.std, seed)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows `[..., H]` (int64 indices) -> their values `[..., H, width]`."""
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        if learns and torch.compiler.is_dynamo_compiling():  # an export that comes this way can't be told apart
            return _read_rows(self.weight, rows, self._anchor, self._number)
        return _Read.apply(self.weight, rows) if learns else gather_rows(self.weight, rows)

    def start(self, rows: Tensor) -> Callable[[], Tensor]:
        """Begin to bring rows `[..., H]` here; what is returned, called once, gives what `forward` would.

        These rows lie here and are read when they are asked for; a table that lies elsewhere begins to copy them now.
        """
        return partial(self, rows)

    def read_only(self, rows: RowKind = "float") -> ReadOnlyTable:
        """A table of these rows that is only read: where they are and as they are (`float`), or quantized (`int8`,
        `fp8`, `fp8_block32`)."""
        from engram.memory.read_only import ReadOnlyTable

        weight = self.weight.detach()
        table = ReadOnlyTable(weight.view(torch.uint8), FloatRows(weight.shape[1], weight.dtype))
        return table.requires_grad_(self.weight.requires_grad).read_only(rows)

    def to_host(self, pinned: bool = True, cache_rows: int = 0, rows: RowKind = "float") -> HostTable:
        """A table that keeps these rows in the host's memory, those that lie there already without a copy.

        Such rows are still this table's: if they change, the new table's do, but for those that its cache holds then.
        `pinned`: locked there for a CUDA device to read, if there is one. `cache_rows`: frequent rows to keep on the
        device where they are used. `rows`: as they are (`float`), or quantized (`int8`, `fp8`, `fp8_block32`).
        """
        return self.read_only().to_host(pinned, cache_rows, rows)

    def to_disk(self, path: str | Path, cache_rows: int = 0, rows: RowKind = "float") -> DiskTable:
        """Write these rows to a file, and give a table that reads them there; the rest as for `to_host`.

        Raises `ConfigError` if `path` is something else than a table of the same rows, or the disk refuses.
        """
        return self.read_only().to_disk(path, cache_rows, rows)

    def extra_repr(self) -> str:
        n_rows, width = self.weight.shape
        return f"n_rows={n_rows}, width={width}, dtype={self.weight.dtype}"

    def _enter(self) -> None:
        """Get a number by which compiled backward passes find this table, and an anchor on its device."""
        self._number = register(self)
        # Something small that takes a gradient, or autograd would not go back through the reading at all.
        self._anchor = torch.zeros(1, device=self.weight.device, requires_grad=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MemoryTable:
        super()._apply(fn, recurse)
        self._enter()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._enter()  # a copy is another table


def tables_in(model: nn.Module) -> list[tuple[str, nn.Module, str, MemoryTable]]:
    """Each memory table in a model: its name, and the module that holds it under which attribute."""
    return [
        (".".join(filter(None, (prefix, attribute))), owner, attribute, child)
        for prefix, owner in model.named_modules()
        for attribute, child in owner._modules.items()  # `named_children` would give one with two names once
        if isinstance(child, MemoryTable)
    ]


def register(table: MemoryTable) -> int:
    """A number by which operators find a table, as long as somebody else keeps it."""
    number = next(_NUMBERS)
    _TABLES[number] = table
    return number


def table_of(number: int) -> MemoryTable:
    """The table of a number."""
    return _TABLES[number]


def concatenated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of a token's heads side by side, `[B, T, H, width]` -> `[B, T, H * width]`, for weights of type `dtype`.

    They come in that type, or under autocast as they are.
    """
    device = values.device.type
    # Autocast makes of all types the one it computes in; a wider one in between would be written for nothing.
    # Compilers meet devices that have autocast alone; torch 2.11's can't trace the question.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    autocast = known and torch.is_autocast_enabled(device)
    return values.flatten(-2).to(values.dtype if autocast else dtype)


class _Read(torch.autograd.Function):
    """Rows of a table, with a row-sparse gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = weight.shape
        return gather_rows(weight, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _row_sparse(grad, rows, ctx.shape), None


def _row_sparse(grad: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    # Made contiguous, or torch refuses on the CPU to add two of them in bfloat16.
    values = grad.reshape(-1, grad.shape[-1]).contiguous()
    return torch.sparse_coo_tensor(rows.reshape(1, -1), values, shape, check_invariants=False)


_NUMBERS = itertools.count()
_READINGS = itertools.count()
_TABLES: weakref.WeakValueDictionary[int, MemoryTable] = weakref.WeakValueDictionary()


def _keep_row_gradient_now(grad: Tensor, rows: Tensor, number: int, call: int) -> Tensor:
    weight = table_of(number).weight
    # Copies: the compiled graph goes on to use the memory of what it passed.
    sparse = _row_sparse(grad.to(weight.dtype, copy=True), rows.clone(), weight.shape)
    weight.grad = sparse if weight.grad is None else weight.grad + sparse
    return grad.new_zeros(1, dtype=torch.float32)


_keep_row_gradient = define(
    "keep_row_gradient(Tensor grad, Tensor rows, int number, int call) -> Tensor",
    _keep_row_gradient_now,
    lambda grad, rows, number, call: grad.new_zeros(1, dtype=torch.float32),
    replayed=False,
)
_read_rows = define(
    "read_rows(Tensor weight, Tensor rows, Tensor anchor, int number) -> Tensor",
    lambda weight, rows, anchor, number: gather_rows(weight, rows),
    lambda weight, rows, anchor, number: weight.new_empty(*rows.shape, weight.shape[1]),
)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    _, rows, _, ctx.number = inputs
    ctx.save_for_backward(rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, None]:
    (rows,) = ctx.saved_tensors
    # A number of its own for each reading, or the compiler would take two with equal gradients for one.
    return None, None, _keep_row_gradient(grad, rows, ctx.number, next(_READINGS)), None


differentiate("read_rows", _backward, _setup)
