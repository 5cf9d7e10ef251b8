"""MoE: routing, grouped experts and shared experts as one layer (DeepSeekMoE, arXiv:2401.06066, section 3)."""

import torch
from torch import Tensor, nn

from engram.config import MoEConfig, require
from engram.experts.grouped import grouped_swiglu
from engram.experts.routing import Router, RoutingStats
from engram.experts.swiglu import SwiGLU


class MoE(nn.Module):
    """Top-k of E fine-grained SwiGLU experts, weighted, plus shared experts; no token is ever dropped.

    Weights: `w_gate_up` `[E, d, 2F]` and `w_down` `[E, F, d]`, so that a token row multiplies from the left.

    Raises:
        ConfigError: a config whose `d_model` is not set.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        require(config.d_model >= 1, "experts.d_model", config.d_model, "1 or more to build a layer")
        self.config = config
        E, D, F = config.n_experts, config.d_model, config.width
        self.router = Router(config)
        self.w_gate_up = nn.Parameter(torch.empty(E, D, 2 * F))
        self.w_down = nn.Parameter(torch.empty(E, F, D))
        nn.init.normal_(self.w_gate_up, std=D**-0.5)
        nn.init.normal_(self.w_down, std=F**-0.5)
        self.shared = SwiGLU(D, config.shared_width) if config.shared_width else None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, d]` -> `[B, T, d]`."""
        return self.forward_with_stats(x)[0]

    def forward_with_stats(self, x: Tensor) -> tuple[Tensor, RoutingStats]:
        """As `forward`, with what the router did."""
        experts, weights, stats = self.router(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        low = x.to(dtype)  # once, for both kinds of experts
        routed = grouped_swiglu(
            low.flatten(0, 1),
            experts.flatten(0, 1),
            weights.flatten(0, 1),
            stats.load_E,
            self.w_gate_up,
            self.w_down,
        ).view(x.shape)
        return routed if self.shared is None else routed + self.shared(low), stats

    def update_balance(self, load_E: Tensor) -> None:
        """After each optimiser step: move the selection bias against that step's loads (tokens per expert)."""
        self.router.update_balance(load_E)
