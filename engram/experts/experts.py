"""The routed experts of a layer: their weights, and what they make of the tokens that chose them.

A module of its own, so that where the weights lie (here, or spread over processes) is nobody else's concern.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engram.config import MoEConfig
from engram.experts.grouped import grouped_swiglu


class Experts(nn.Module):
    """E SwiGLU maps of width F (arXiv:2401.06066, equation 3).

    Weights: `w_gate_up` `[E, d, 2F]` and `w_down` `[E, F, d]`, so that a token row multiplies from the left. They start
    as N(0, 1/fan-in), those of `w_down` times `output_scale`.
    """

    def __init__(self, config: MoEConfig, output_scale: float = 1.0) -> None:
        super().__init__()
        E, D, F = config.n_experts, config.d_model, config.width
        self.w_gate_up = nn.Parameter(torch.empty(E, D, 2 * F))
        self.w_down = nn.Parameter(torch.empty(E, F, D))
        self.output_scale = output_scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        nn.init.normal_(self.w_gate_up, std=self.w_gate_up.shape[1] ** -0.5)
        nn.init.normal_(self.w_down, std=self.output_scale * self.w_down.shape[1] ** -0.5)

    def forward(self, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, load_E: Tensor) -> Tensor:
        """sum_k weight_k * expert_k(x) for each token, `[N, D]`; arguments as `grouped_swiglu`."""
        return grouped_swiglu(x_ND, experts_NK, weights_NK, load_E, self.w_gate_up, self.w_down)
