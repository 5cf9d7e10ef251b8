"""How a sublayer reads the residual stream and writes to it: one branch, or M joined by hyper-connections.

Manifold-constrained hyper-connections (arXiv:2512.24880): H_pre reads the branches into the sublayer's input, H_post
writes its output to them, and H_res, a doubly stochastic matrix, mixes them, all computed for each token.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engram.backbone.norm import RMSNorm
from engram.kernels import read_branches, sinkhorn, write_branches
from engram.tensors import widen


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

    H_pre = sigmoid(.), H_post = 2 sigmoid(.), H_res = Sinkhorn-Knopp(exp(.)) in 20 steps, each of a static bias plus a
    small learned factor (0.01 at the start) times a linear map of the RMS-normalised, flattened branches.
    """

    def __init__(self, branches: int, d_model: int, norm_eps: float) -> None:
        super().__init__()
        M = branches
        self.branches = M
        self.norm = RMSNorm(M * d_model, eps=norm_eps)
        self.dynamic = nn.Linear(M * d_model, M + M + M * M, bias=False)
        self.factor = nn.Parameter(torch.empty(3))
        self.static = nn.Parameter(torch.empty(M + M + M * M))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The static part, a plain residual, and how much the learned one counts."""
        M = self.branches
        self.factor.fill_(0.01)
        self.static[:M] = -math.log(M - 1)  # sigmoid = 1/M: equal branches are read as their mean
        self.static[M : 2 * M] = 0.0  # 2 sigmoid = 1: every branch gets the whole update
        near_identity = 4.0 * torch.eye(M, device=self.static.device) - 4.0  # and still able to learn
        self.static[2 * M :] = near_identity.flatten()

    def read(self, hidden: Tensor) -> tuple[Tensor, Mixing]:
        """Branches `[B, T, M, d]` -> the sublayer's input `[B, T, d]`, and how its output will be taken."""
        M = self.branches
        sizes = [M, M, M * M]
        with torch.autocast(hidden.device.type, enabled=False):
            wide = widen(hidden)
            factor = torch.cat([f.expand(n) for f, n in zip(widen(self.factor), sizes, strict=True)])
            normed = self.norm(wide.flatten(-2)).to(self.dynamic.weight.dtype)
            maps = widen(self.static) + factor * widen(self.dynamic(normed))
            pre, post, res = maps.split(sizes, dim=-1)
            mixing = Mixing(2 * torch.sigmoid(post), sinkhorn(res.unflatten(-1, (M, M))))
            return read_branches(hidden, torch.sigmoid(pre)), mixing

    def write(self, hidden: Tensor, update: Tensor, mixing: Any) -> Tensor:
        """H_res hidden + H_post update, `[B, T, M, d]`, in the type of `hidden`."""
        return write_branches(hidden, update, mixing.post, mixing.res)


def build_residual(branches: int, d_model: int, norm_eps: float) -> PlainResidual | HyperConnection:
    """Plain for one branch, hyper-connections for more."""
    return PlainResidual() if branches == 1 else HyperConnection(branches, d_model, norm_eps)
