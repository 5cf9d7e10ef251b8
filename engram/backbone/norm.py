"""RMSNorm (arXiv:1910.07467) that computes in float32 whatever type comes in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engram.kernels import load_kernels, rms_norm


class RMSNorm(nn.Module):
    """`[..., d]` -> `[..., d]`, in the type of the input; computed in float32 or wider."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        load_kernels()
        self.weight = nn.Parameter(torch.empty(d))
        self.eps = eps
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"
