"""Rows of a memory table spread over processes: fetched from their owners, gradients sent back to them.

Row r lies on process r mod n of a group of n: neighbours never share one, so that the rows of a few frequent N-grams,
or of one small head, are everybody's work. What travels is in proportion to the distinct rows that a process reads,
never to the table: their indices, the rows, and their gradients, each once (arXiv:2601.07372, section 2.5).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engram.config import ConfigError
from engram.kernels import combine_rows, gather_rows
from engram.kernels.random import fill_normal_
from engram.memory import MemoryTable, ReadOnlyTable
from engram.memory.row_formats import RowKind
from engram.parallel.mesh import Mesh

Group = dist.ProcessGroup


class Exchange:
    """Tensors whose rows go to the members of a group and come from them, in uneven parts.

    Made with how many rows this process sends to each, `[n]`, it tells the others; `sends` and `receives` are known
    when they have told it.
    """

    def __init__(self, sends: Tensor, group: Group) -> None:
        self.group = group
        self._sends, self._receives = sends, torch.empty_like(sends)
        self._work = dist.all_to_all_single(self._receives, sends, group=group, async_op=True)
        self._counts: tuple[list[int], list[int]] | None = None

    @property
    def counts(self) -> tuple[list[int], list[int]]:
        """Rows sent to each member, and received from each."""
        if self._counts is None:
            _wait(self._work)
            self._counts = self._sends.tolist(), self._receives.tolist()
        return self._counts

    def forth(self, x: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Send `x`, part by part; what comes, once the work is waited for."""
        sends, receives = self.counts
        return self._send(x, sends, receives)

    def back(self, x: Tensor) -> tuple[Tensor, dist.Work | None]:
        """Send an answer for each row that came by `forth`; the answers to what was sent."""
        sends, receives = self.counts
        return self._send(x, receives, sends)

    def _send(self, x: Tensor, sends: list[int], receives: list[int]) -> tuple[Tensor, dist.Work | None]:
        result = x.new_empty(sum(receives), *x.shape[1:])
        work = dist.all_to_all_single(result, x.contiguous(), receives, sends, group=self.group, async_op=True)
        return result, work


def _wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


class Lookup:
    """The rows that one process reads of a table in one batch, on their way: distinct rows, who has them, and when they
    come. Each stage starts the one before if nobody did: `ask`, `fetch`, `values`; then `give_back`.

    Args:
        rows: row indices of the whole table, any shape.
        per_owner: rows that an owner has at most.
        group: of the n owners.
    """

    def __init__(self, rows: Tensor, per_owner: int, group: Group) -> None:
        self.rows = rows
        n = group.size()
        # Ordered by owner, then by place there.
        keys, self._inverse = (rows % n * per_owner + rows // n).unique(return_inverse=True)
        bounds = torch.arange(n + 1, device=rows.device) * per_owner
        self.exchange = Exchange(torch.searchsorted(keys, bounds).diff(), group)
        self._places = keys % per_owner
        self._wanted: Tensor | None = None
        self._wanted_work: dist.Work | None = None
        self._fetched: Tensor | None = None
        self._fetched_work: dist.Work | None = None

    def ask(self) -> None:
        """Send each owner the places of the rows wanted of it."""
        if self._wanted is None:
            self._wanted, self._wanted_work = self.exchange.forth(self._places)

    @property
    def wanted(self) -> Tensor:
        """Places of the rows here that others want, by who wants them."""
        self.ask()
        _wait(self._wanted_work)
        self._wanted_work = None
        assert self._wanted is not None
        return self._wanted

    def fetch(self, weight: Tensor) -> None:
        """Send the others the rows they want, as `weight` holds them now."""
        if self._fetched is None:
            self._fetched, self._fetched_work = self.exchange.back(gather_rows(weight, self.wanted))

    def values(self, weight: Tensor) -> Tensor:
        """The rows read, `[..., W]`."""
        self.fetch(weight)
        _wait(self._fetched_work)
        fetched, self._fetched, self._fetched_work = self._fetched, None, None  # held no longer than needed
        assert fetched is not None
        return gather_rows(fetched, self._inverse)

    def give_back(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients `[..., W]` of what `values` gave, summed for each row, to the owners: what this process gets,
        places and gradients, a place once for each process that read it."""
        _, sums = combine_rows(self._inverse.flatten(), grad.reshape(-1, grad.shape[-1]))
        received, work = self.exchange.forth(sums)
        _wait(work)
        return self.wanted, received


class ShardedTable(MemoryTable):
    """This process's rows of a `MemoryTable`, in its place: read by the row numbers of the whole table.

    Every process of the group must read at the same time, in the same order of tables, with or without gradients. The
    gradient of `weight` is row-sparse, and the mean over all processes of the mesh, as `fully_shard` makes it for dense
    parameters. Where groups hold copies, each gets the gradients of all.

    Args:
        table: the whole table; on the meta device it stands for one that is nowhere yet.
        mesh: whose `tables` say who shares the rows.
    """

    def __init__(self, table: MemoryTable, mesh: Mesh) -> None:
        nn.Module.__init__(self)
        self.n_rows = len(table.weight)
        self.std = table.std
        self.group: Group = mesh.tables.get_group("table")
        self.copies = mesh.sizes.world // mesh.sizes.table
        self.replicas: Group | None = mesh.tables.get_group("table_replicate") if self.copies > 1 else None
        self.rank, self.n_shards = self.group.rank(), self.group.size()
        self.per_owner = -(-self.n_rows // self.n_shards)
        mine = table.weight.detach()[self.rank :: self.n_shards].clone()
        self.weight = nn.Parameter(mine, requires_grad=table.weight.requires_grad)
        self._ahead: list[Lookup] = []
        self._enter()

    def _fill(self, seed: int) -> None:
        fill_normal_(self.weight, self.std, seed, first=self.rank, stride=self.n_shards)

    def prepare(self, rows: Tensor) -> None:
        """Begin the exchange of indices for rows `[..., H]` that `forward` will read in training mode, after all that
        were prepared before and not read yet."""
        self._ahead.append(Lookup(rows, self.per_owner, self.group))

    def ask_ahead(self) -> None:
        """Ask the owners for the rows of all that is prepared."""
        for lookup in self._ahead:
            lookup.ask()

    def fetch_ahead(self) -> None:
        """Send for the rows that are read next; they must not change until they are."""
        if self._ahead:
            self._ahead[0].fetch(self.weight)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows `[..., H]` (int64 indices of the whole table) -> their values `[..., H, width]`.

        Raises RuntimeError if other rows are prepared: processes that go on differently would wait forever.
        """
        if not (self._ahead and self.training):
            lookup = Lookup(rows, self.per_owner, self.group)
        else:
            lookup = self._ahead.pop(0)
            on_cpu = rows.device.type == "cpu"  # elsewhere the host would have to wait for the answer
            if lookup.rows.shape != rows.shape or (on_cpu and not torch.equal(lookup.rows, rows)):
                raise RuntimeError(
                    "a sharded table was prepared for other rows than are read: prepare every batch once"
                )
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return _Fetch.apply(self.weight, lookup, self)
        return lookup.values(self.weight)

    def collect(self, places: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
        """Places and gradients of all copies of these rows, one after the other."""
        if self.replicas is None:
            return places, grads
        counts = _gathered(places.new_tensor([len(places)]), self.replicas).tolist()
        most = max(counts)
        filled = (torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in (places, grads))
        all_places, all_grads = (_gathered(x, self.replicas).unflatten(0, (len(counts), most)) for x in filled)
        places = torch.cat([part[:n] for part, n in zip(all_places, counts, strict=True)])
        return places, torch.cat([part[:n] for part, n in zip(all_grads, counts, strict=True)])

    def read_only(self, rows: RowKind = "float") -> ReadOnlyTable:
        """Raises `ConfigError`: no process has all rows."""
        raise ConfigError("a sharded table cannot leave its device: save the model, and offload it where it is loaded")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}: rows {self.rank}::{self.n_shards} of {self.n_rows}"


def _gathered(x: Tensor, group: Group) -> Tensor:
    result = x.new_empty(group.size() * len(x), *x.shape[1:])
    dist.all_gather(list(result.chunk(group.size())), x.contiguous(), group=group)
    return result


class _Fetch(torch.autograd.Function):
    """Rows from their owners, with a row-sparse gradient for the rows here."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, lookup: Lookup, table: ShardedTable) -> Tensor:
        ctx.lookup, ctx.table = lookup, table
        return lookup.values(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        table: ShardedTable = ctx.table
        places, grads = table.collect(*ctx.lookup.give_back(grad))
        grads = grads / (table.n_shards * table.copies)
        shape = table.weight.shape
        return torch.sparse_coo_tensor(places.unsqueeze(0), grads, shape, check_invariants=False), None, None
