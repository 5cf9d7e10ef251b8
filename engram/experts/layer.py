"""MoE: routing, grouped experts and shared experts as one layer (DeepSeekMoE, arXiv:2401.06066, section 3)."""

from torch import Tensor, nn

from engram.config import MoEConfig, require
from engram.experts.experts import Experts
from engram.experts.routing import Router, RoutingStats
from engram.experts.swiglu import SwiGLU
from engram.tensors import product_type


class MoE(nn.Module):
    """Top-k of E fine-grained SwiGLU experts, weighted, plus shared experts; no token is ever dropped.

    Output maps start scaled by `output_scale`: a model makes it smaller the deeper it is.

    Raises:
        ConfigError: a config whose `d_model` is not set.
    """

    def __init__(self, config: MoEConfig, output_scale: float = 1.0) -> None:
        super().__init__()
        require(config.d_model >= 1, "experts.d_model", config.d_model, "1 or more to build a layer")
        self.config = config
        self.router = Router(config)
        self.experts = Experts(config, output_scale)
        self.shared = SwiGLU(config.d_model, config.shared_width, output_scale) if config.shared_width else None

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, d]` -> `[B, T, d]`."""
        return self.forward_with_stats(x)[0]

    def forward_with_stats(self, x: Tensor) -> tuple[Tensor, RoutingStats]:
        """As `forward`, with what the router did."""
        experts, weights, stats = self.router(x)
        low = x.to(product_type(x))  # once, for both kinds of experts
        routed = self.experts(low.flatten(0, 1), experts.flatten(0, 1), weights.flatten(0, 1), stats.load_E).view(
            x.shape
        )
        return routed if self.shared is None else routed + self.shared(low), stats

    def update_balance(self, load_E: Tensor) -> None:
        """After each optimiser step: move the selection bias against that step's loads (tokens per expert)."""
        self.router.update_balance(load_E)
