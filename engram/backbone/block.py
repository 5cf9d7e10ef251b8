"""One decoder block: attention, then a dense feed-forward map or experts, each behind an RMSNorm and a residual."""

from __future__ import annotations

import math

from torch import Tensor, nn

from engram.backbone.attention import build_attention
from engram.backbone.norm import RMSNorm
from engram.backbone.positions import Continuation, Positions
from engram.backbone.residual import build_residual
from engram.config import ModelConfig
from engram.experts import MoE, RoutingStats, SwiGLU


class Block(nn.Module):
    """Block number `index` (0-based) of a model; the first `n_dense_layers` hold no experts."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        D, eps = config.d_model, config.norm_eps
        output_scale = 1 / math.sqrt(2 * config.n_layers)
        self.attention_residual = build_residual(config.branches, D, eps)
        self.attention_norm = RMSNorm(D, eps=eps)
        self.attention = build_attention(config.attention, D, eps, output_scale)
        self.ffn_residual = build_residual(config.branches, D, eps)
        self.ffn_norm = RMSNorm(D, eps=eps)
        self.ffn: MoE | SwiGLU
        if config.experts is not None and index >= config.n_dense_layers:
            self.ffn = MoE(config.experts, output_scale)
        else:
            self.ffn = SwiGLU(D, config.dense_width, output_scale)

    def forward(self, hidden: Tensor, at: Positions | Continuation) -> tuple[Tensor, RoutingStats | None]:
        """`[B, T, d]` (or `[B, T, M, d]`) -> the same shape, and what the router did if there is one."""
        x, mixing = self.attention_residual.read(hidden)
        x = self.attention_norm(x)
        y = self.attention(x, at) if isinstance(at, Positions) else self.attention.step(x, *at)
        hidden = self.attention_residual.write(hidden, y, mixing)
        x, mixing = self.ffn_residual.read(hidden)
        x = self.ffn_norm(x)
        y, stats = self.ffn.forward_with_stats(x) if isinstance(self.ffn, MoE) else (self.ffn(x), None)
        return self.ffn_residual.write(hidden, y, mixing), stats
