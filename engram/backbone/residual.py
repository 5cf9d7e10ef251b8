"""How a sublayer reads the residual stream and writes to it: one branch, or M joined by hyper-connections.

Manifold-constrained hyper-connections (arXiv:2512.24880): H_pre reads the branches into the sublayer's input, H_post
writes its output to them, and H_res, a doubly stochastic matrix, mixes them, all computed for each token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from engram.backbone.norm import RMSNorm
from engram.tensors import widen

_SINKHORN_STEPS = 20


class Mixing(NamedTuple):
    """How one token's branches take a sublayer's output: weights `[B, T, M]` and mixing matrices `[B, T, M, M]`."""

    post: Tensor
    res: Tensor


class PlainResidual(nn.Module):
    """One branch: the sublayer reads the stream and its output is added."""

    def read(self, hidden: Tensor) -> tuple[Tensor, None]:
        """The stream `[B, T, d]` is the input."""
        return hidden, None

    def write(self, hidden: Tensor, update: Tensor, mixing: Any) -> Tensor:
        """hidden + update."""
        return hidden + update


class HyperConnection(nn.Module):
    """M branches `[B, T, M, d]`. At the start it is a plain residual on M equal branches.

    H_pre = sigmoid(.), H_post = 2 sigmoid(.), H_res = Sinkhorn-Knopp(exp(.)), each of a static bias plus a small
    learned factor (0.01 at the start) times a linear map of the RMS-normalised, flattened branches.
    """

    def __init__(self, branches: int, d_model: int, norm_eps: float) -> None:
        super().__init__()
        M = branches
        self.branches = M
        self.norm = RMSNorm(M * d_model, eps=norm_eps)
        self.dynamic = nn.Linear(M * d_model, M + M + M * M, bias=False)
        self.factor = nn.Parameter(torch.full((3,), 0.01))
        self.static = nn.Parameter(torch.empty(M + M + M * M))
        with torch.no_grad():
            self.static[:M] = -math.log(M - 1)  # sigmoid = 1/M: equal branches are read as their mean
            self.static[M : 2 * M] = 0.0  # 2 sigmoid = 1: every branch gets the whole update
            self.static[2 * M :] = (4.0 * torch.eye(M) - 4.0).flatten()  # near the identity, and still able to learn

    def read(self, hidden: Tensor) -> tuple[Tensor, Mixing]:
        """Branches `[B, T, M, d]` -> the sublayer's input `[B, T, d]`, and how its output will be taken."""
        M = self.branches
        sizes = [M, M, M * M]
        with torch.autocast(hidden.device.type, enabled=False):
            wide = widen(hidden)
            factor = torch.cat([f.expand(n) for f, n in zip(self.factor, sizes, strict=True)])
            maps = self.static + factor * self.dynamic(self.norm(wide.flatten(-2)))
            pre, post, res = maps.split(sizes, dim=-1)
            x = (torch.sigmoid(pre).unsqueeze(-1) * wide).sum(-2)
            return x.to(hidden.dtype), Mixing(2 * torch.sigmoid(post), sinkhorn(res.unflatten(-1, (M, M))))

    def write(self, hidden: Tensor, update: Tensor, mixing: Any) -> Tensor:
        """H_res hidden + H_post update, `[B, T, M, d]`, in the type of `hidden`."""
        with torch.autocast(hidden.device.type, enabled=False):  # which would round the stream itself
            mixed = mixing.res @ widen(hidden)
            return torch.addcmul(mixed, mixing.post.unsqueeze(-1), widen(update).unsqueeze(-2)).to(hidden.dtype)


def sinkhorn(logits: Tensor) -> Tensor:
    """exp(logits) `[..., M, M]` made doubly stochastic by 20 Sinkhorn-Knopp steps, each columns first, then rows."""
    first = rearrange(logits, "... m n -> m n ...").contiguous()
    # Contiguous, since batches of products want whole matrices.
    return rearrange(_Sinkhorn.apply(first), "m n ... -> ... m n").contiguous()


class _Sinkhorn(torch.autograd.Function):
    """Matrices along the first two axes, so that each sum runs over all tokens at once.

    Only the result and the sums that were divided by are kept; backward goes through the steps in reverse.
    """

    @staticmethod
    def forward(ctx: Any, logits_MM: Tensor) -> Tensor:
        p = logits_MM.softmax(0)  # exp and the first division of the columns, without overflow
        sums = []
        for axis in _axes_after_the_first():
            sums.append(p.sum(axis, keepdim=True))
            p = p / sums[-1]
        ctx.save_for_backward(p, *sums)
        return p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        p, *sums = ctx.saved_tensors
        grad = grad.contiguous()
        for axis, total in zip(reversed(_axes_after_the_first()), reversed(sums), strict=True):
            grad = (grad - (grad * p).sum(axis, keepdim=True)) / total
            p = p * total
        return p * (grad - (grad * p).sum(0, keepdim=True))


def _axes_after_the_first() -> list[int]:
    return ([0, 1] * _SINKHORN_STEPS)[1:]


def build_residual(branches: int, d_model: int, norm_eps: float) -> PlainResidual | HyperConnection:
    """Plain for one branch, hyper-connections for more."""
    return PlainResidual() if branches == 1 else HyperConnection(branches, d_model, norm_eps)
