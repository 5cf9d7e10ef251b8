"""Experts spread over processes: tokens go to where their experts are, and the results come back.

A token travels once to each process that has any of its experts, however many of them, and one sum comes back.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.tensor import DTensor, Replicate, Shard

from engram.experts import Experts
from engram.experts.grouped import grouped_swiglu
from engram.parallel.local import local_part
from engram.parallel.mesh import Mesh
from engram.tensors import widen


class ShardedExperts(Experts):
    """A process's share of the experts of a layer, in the place of all: called as `Experts` is.

    Process i of a group of n has the E / n experts from i E / n on. Every process of the group must call it at the same
    time. Gradients of weights are the sum over the group's tokens, divided by its size; `fully_shard`, or a mean over
    the other groups, makes them the mean over all processes.

    Args:
        experts: all experts of the layer.
        mesh: whose `experts` say who shares them.
    """

    def __init__(self, experts: Experts, mesh: Mesh) -> None:
        nn.Module.__init__(self)
        self.group = mesh.experts.get_group("expert")
        self.n_shards = self.group.size()
        self._layout = mesh.experts_in_order
        self.n_local = len(experts.w_gate_up) // self.n_shards
        mine = slice(self.group.rank() * self.n_local, (self.group.rank() + 1) * self.n_local)
        self.w_gate_up = nn.Parameter(experts.w_gate_up.detach()[mine].clone())
        self.w_down = nn.Parameter(experts.w_down.detach()[mine].clone())

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, load_E: Tensor) -> Tensor:
        """sum_k weight_k * expert_k(x) for each token, `[N, D]`; arguments as `grouped_swiglu`, of this process's
        tokens and all experts."""
        R, L = self.n_shards, self.n_local
        shard_NK = experts_NK // L
        goes_NR = torch.zeros(len(x_ND), R, dtype=torch.bool, device=x_ND.device).scatter_(1, shard_NK, True)
        token_S = goes_NR.T.nonzero()[:, 1]  # tokens to send, shard by shard
        slot_NR = goes_NR.cumsum(0) - 1  # a token's place among those that go to a shard
        copy_C = shard_NK.flatten().argsort(stable=True)  # a copy is a token and one of its experts
        slot_C = slot_NR.gather(1, shard_NK).flatten()[copy_C]
        sends = torch.stack([goes_NR.sum(0), load_E.view(R, L).sum(1)], 1)
        receives = torch.empty_like(sends)
        dist.all_to_all_single(receives, sends, group=self.group)
        (tokens_out, copies_out), (tokens_in, copies_in) = sends.T.tolist(), receives.T.tolist()

        x_in = self._send(x_ND[token_S], tokens_out, tokens_in)
        described_C = self._send(slot_C * L + experts_NK.flatten()[copy_C] % L, copies_out, copies_in)
        weights_C = self._send(weights_NK.flatten()[copy_C], copies_out, copies_in)
        first_token_R = receives[:, 0].cumsum(0) - receives[:, 0]
        token_C = described_C // L + first_token_R.repeat_interleave(receives[:, 1], output_size=sum(copies_in))
        expert_C = described_C % L

        # All processes have taken part in this gradient's sum, `n_shards` of them in this group.
        w_gate_up, w_down = (_WithScaledGradient.apply(w, 1 / R) for w in (self.w_gate_up, self.w_down))
        load_L = torch.bincount(expert_C, minlength=L)
        y_CD = grouped_swiglu(x_in[token_C], expert_C[:, None], weights_C[:, None], load_L, w_gate_up, w_down)
        y_in = _sums(y_CD, token_C, x_in)
        return _sums(self._send(y_in, tokens_in, tokens_out), token_S, x_ND)

    def of_all(self, part: Tensor) -> DTensor:
        """A tensor of this process's experts, `[E / n, ...]` or what FSDP2 left of it, as a part of all experts'."""
        here = local_part(part)
        shape = torch.Size([self.n_local * self.n_shards, *here.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        placements = (Replicate(), Shard(0), Shard(0))
        return DTensor.from_local(here, self._layout, placements, run_check=False, shape=shape, stride=stride)

    def _send(self, x: Tensor, sends: list[int], receives: list[int]) -> Tensor:
        """Rows of `x` to the members of the group, part by part; what comes from them."""
        return all_to_all_single_autograd(x, receives, sends, self.group)


def _sums(x: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Sums of what goes into the same row, rounded once to the type of `like`."""
    return torch.zeros_like(widen(like)).index_add(0, rows, widen(x)).to(like.dtype)


class _WithScaledGradient(torch.autograd.Function):
    """A weight whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.scale, None
