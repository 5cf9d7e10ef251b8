"""Causal self-attention within documents: grouped-query (arXiv:2305.13245) and multi-head latent (arXiv:2405.04434).

Both go through `scaled_dot_product_attention`, or on the CPU through a kernel that takes half its time. What depends on
positions alone, angles and mask, is made once per forward pass and shared by all blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engram.backbone.norm import RMSNorm
from engram.backbone.rope import rotations
from engram.config import GQAConfig, MLAConfig
from engram.kernels import attention, has_attention, norm_rotate


class Positions(NamedTuple):
    """Rotation angles `[T, dim / 2]`, and what each position may see: all from `starts` `[B, T]` up to itself, and the
    same as a mask `[B, 1, T, T]` where a mask is needed (None: all earlier positions of the row)."""

    cos: Tensor
    sin: Tensor
    starts: Tensor | None
    mask: Tensor | None


def positions_of(token_ids: Tensor, document_ids: Tensor | None, config: GQAConfig | MLAConfig) -> Positions:
    """Angles and mask for ids `[B, T]`: a token sees its own document's tokens up to itself."""
    T, device = token_ids.shape[1], token_ids.device
    dim = config.head_dim if isinstance(config, GQAConfig) else config.qk_rope_head_dim
    cos, sin = rotations(T, dim, config.rope_theta, device)
    if document_ids is None:
        return Positions(cos, sin, None, None)
    if has_attention(device.type):
        changes = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0))
        starts = torch.where(changes, torch.arange(T, device=device), 0).cummax(1).values
        return Positions(cos, sin, starts, None)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return Positions(cos, sin, None, (same & causal).unsqueeze(1))


class GroupedQueryAttention(nn.Module):
    """Query heads in groups that share a key and value head; queries and keys RMS-normalised per head if configured."""

    def __init__(self, config: GQAConfig, d_model: int, norm_eps: float, output_scale: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.split = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        self.qkv = nn.Linear(d_model, sum(self.split), bias=False)
        self.out = nn.Linear(config.n_heads * config.head_dim, d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else None
        self.output_scale = output_scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the maps anew."""
        _draw_maps(self, self.output_scale)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """`[B, T, d]` -> `[B, T, d]`."""
        q, k, v = (
            rearrange(part, "B T (h c) -> B T h c", c=self.config.head_dim)
            for part in self.qkv(x).split(self.split, dim=-1)
        )
        q, k = _turn(q, positions, self.q_norm), _turn(k, positions, self.k_norm)
        y = _attend(q, k, v, positions)
        return self.out(y.flatten(2))


class MultiHeadLatentAttention(nn.Module):
    """Keys and values of all heads come from one small latent; one rotated key part is shared by the heads."""

    def __init__(self, config: MLAConfig, d_model: int, norm_eps: float, output_scale: float = 1.0) -> None:
        super().__init__()
        self.config = config
        H, nope, rope = config.n_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        if config.q_lora_rank:
            self.q_down = nn.Linear(d_model, config.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(config.q_lora_rank, eps=norm_eps)
        self.q_up = nn.Linear(config.q_lora_rank or d_model, H * (nope + rope), bias=False)
        self.kv_down = nn.Linear(d_model, config.kv_lora_rank + rope, bias=False)
        self.kv_norm = RMSNorm(config.kv_lora_rank, eps=norm_eps)
        self.kv_up = nn.Linear(config.kv_lora_rank, H * (nope + config.v_head_dim), bias=False)
        self.out = nn.Linear(H * config.v_head_dim, d_model, bias=False)
        self.output_scale = output_scale
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the maps anew."""
        _draw_maps(self, self.output_scale)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """`[B, T, d]` -> `[B, T, d]`."""
        c = self.config
        q = self.q_up(self.q_norm(self.q_down(x)) if c.q_lora_rank else x)
        q = rearrange(q, "B T (h c) -> B T h c", h=c.n_heads)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_down(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = rearrange(self.kv_up(self.kv_norm(latent)), "B T (h c) -> B T h c", h=c.n_heads)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_rope = _turn(k_rope.unsqueeze(2), positions).expand(-1, -1, c.n_heads, -1)
        q = torch.cat([q_nope, _turn(q_rope, positions)], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        y = _attend(q, k, v, positions)
        return self.out(y.flatten(2))


def _draw_maps(attention: Attention, output_scale: float) -> None:
    """N(0, 1/fan-in) for all maps, the output's times `output_scale`."""
    for linear in attention.children():
        if isinstance(linear, nn.Linear):
            scale = output_scale if linear is attention.out else 1.0
            nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)


def _turn(heads: Tensor, positions: Positions, norm: RMSNorm | None = None) -> Tensor:
    """Heads `[B, T, h, c]`, normed if there is a norm, turned by their positions' angles."""
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    return norm_rotate(heads, weight, positions.cos, positions.sin, eps)


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
    """Softmax attention of heads `[B, T, h, c]`; values may be narrower than queries and keys."""
    with torch.autocast(v.device.type, enabled=False):
        if has_attention(v.device.type):
            return attention(q, k, v, positions.starts)
        # Heads of unequal width have no memory-saving kernel; zeros beside the values change nothing.
        padded = F.pad(v, (0, max(0, q.shape[-1] - v.shape[-1])))
        mask, grouped = positions.mask, k.shape[2] < q.shape[2]
        q, k, padded = (x.to(v.dtype).transpose(1, 2) for x in (q, k, padded))
        y = F.scaled_dot_product_attention(q, k, padded, mask, is_causal=mask is None, enable_gqa=grouped)
        return y[..., : v.shape[-1]].transpose(1, 2)


Attention = GroupedQueryAttention | MultiHeadLatentAttention


def build_attention(
    config: GQAConfig | MLAConfig, d_model: int, norm_eps: float, output_scale: float = 1.0
) -> Attention:
    """The attention that a config names, called with `(x [B, T, d], Positions)`; its output map starts times
    `output_scale`."""
    if isinstance(config, GQAConfig):
        return GroupedQueryAttention(config, d_model, norm_eps, output_scale)
    return MultiHeadLatentAttention(config, d_model, norm_eps, output_scale)
