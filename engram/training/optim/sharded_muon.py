"""Muon for weights that FSDP2 has cut into rows: each matrix is put together and orthogonalised by one process.

Work and memory are 1/n of one process's; a matrix travels twice a step, as its update goes to the process that works on
it and comes back, which is no more than gathering it once to everyone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from engram.parallel.local import local_part
from engram.parallel.traffic import dealt
from engram.training.optim.muon import BatchedMuon, batches, orthogonalized


class ShardedMuon(BatchedMuon):
    """`BatchedMuon` on DTensors: `[a, b]` matrices cut into rows, and `[E, a, b]` stacks cut between matrices.

    Every process of the mesh must step at the same time.
    """

    def _rounds(self, weights: list[Tensor]) -> list[list[Tensor]]:
        cut: list[Tensor] = [w for w in weights if isinstance(w, DTensor) and w.ndim == 2]
        held = {id(w) for w in cut}
        rest = [w for w in weights if id(w) not in held and local_part(w).numel()]
        return [*([cut] if cut else []), *batches(rest)]

    def _orthogonalized(self, weights: list[Tensor], updates: Sequence[Tensor]) -> list[Tensor]:
        if not (isinstance(weights[0], DTensor) and weights[0].ndim == 2):
            return orthogonalized(updates)
        return _Exchange(cast(list[DTensor], weights)).orthogonalized(list(updates))


class _Exchange:
    """Who works on which of some matrices (`dealt` says), and the rows that travel for it."""

    def __init__(self, weights: list[DTensor]) -> None:
        mesh = weights[0].device_mesh
        self.group = mesh.get_group(mesh.ndim - 1)
        self.n, self.rank = self.group.size(), self.group.rank()
        self.shapes = [tuple(weight.shape) for weight in weights]
        self.owned = dealt(self.shapes, self.n)

    def _rows(self, i: int, rank: int) -> int:
        """Rows of matrix i that a rank has: those of `torch.chunk`."""
        rows = self.shapes[i][0]
        each = -(-rows // self.n)
        return min(max(rows - rank * each, 0), each)

    def _numbers(self, owner: int, rank: int) -> list[int]:
        """Of each matrix that an owner works on, the numbers that a rank has."""
        return [self._rows(i, rank) * self.shapes[i][1] for i in self.owned[owner]]

    def orthogonalized(self, updates: list[Tensor]) -> list[Tensor]:
        """This process's rows of each update `[rows, b]`, orthogonalised as whole matrices."""
        ranks = range(self.n)
        here = [sum(self._numbers(owner, self.rank)) for owner in ranks]  # of others' matrices
        there = [sum(self._numbers(self.rank, rank)) for rank in ranks]  # of this process's matrices
        sent = torch.cat([updates[i].flatten() for owner in ranks for i in self.owned[owner]])
        received = sent.new_empty(sum(there))
        dist.all_to_all_single(received, sent, there, here, group=self.group)

        mine = self.owned[self.rank]
        parts = [p.split(self._numbers(self.rank, r)) for r, p in zip(ranks, received.split(there), strict=True)]
        whole = {i: torch.cat([p[k] for p in parts]).view(self.shapes[i]) for k, i in enumerate(mine)}
        numbers = {id(matrix): i for i, matrix in whole.items()}
        for batch in batches(list(whole.values())):
            for before, after in zip(batch, orthogonalized(batch), strict=True):
                whole[numbers[id(before)]] = after

        pieces = [whole[i].split([self._rows(i, r) for r in ranks]) for i in mine]
        answer = torch.cat([received.new_empty(0), *(piece[r].flatten() for r in ranks for piece in pieces)])
        back = torch.empty_like(sent)
        dist.all_to_all_single(back, answer, here, there, group=self.group)
        result = list(updates)
        for owner, part in zip(ranks, back.split(here), strict=True):
            for i, flat in zip(self.owned[owner], part.split(self._numbers(owner, self.rank)), strict=True):
                result[i] = flat.view_as(updates[i])
        return result
