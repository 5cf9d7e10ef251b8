"""Causal self-attention within documents: grouped-query (arXiv:2305.13245) and multi-head latent (arXiv:2405.04434).

Both go through `scaled_dot_product_attention`. What depends on positions alone, angles and mask, is made once per
forward pass and shared by all blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engram.backbone.norm import RMSNorm
from engram.backbone.rope import rotate, rotations
from engram.config import GQAConfig, MLAConfig
from engram.tensors import widen


class Positions(NamedTuple):
    """Rotation angles `[T, dim / 2]`, and who may see whom `[B, 1, T, T]` (None: all earlier positions of the row)."""

    cos: Tensor
    sin: Tensor
    mask: Tensor | None


def positions_of(token_ids: Tensor, document_ids: Tensor | None, config: GQAConfig | MLAConfig) -> Positions:
    """Angles and mask for ids `[B, T]`: a token sees its own document's tokens up to itself."""
    T, device = token_ids.shape[1], token_ids.device
    dim = config.head_dim if isinstance(config, GQAConfig) else config.qk_rope_head_dim
    cos, sin = rotations(T, dim, config.rope_theta, device)
    if document_ids is None:
        return Positions(cos, sin, None)
    same = document_ids[:, :, None] == document_ids[:, None, :]
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    return Positions(cos, sin, (same & causal).unsqueeze(1))


class GroupedQueryAttention(nn.Module):
    """Query heads in groups that share a key and value head; queries and keys RMS-normalised per head if configured."""

    def __init__(self, config: GQAConfig, d_model: int, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        self.split = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        self.qkv = nn.Linear(d_model, sum(self.split), bias=False)
        self.out = nn.Linear(config.n_heads * config.head_dim, d_model, bias=False)
        self.q_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """`[B, T, d]` -> `[B, T, d]`."""
        q, k, v = (
            rearrange(part, "B T (h c) -> B h T c", c=self.config.head_dim)
            for part in self.qkv(x).split(self.split, dim=-1)
        )
        q = rotate(self.q_norm(widen(q)), positions.cos, positions.sin)
        k = rotate(self.k_norm(widen(k)), positions.cos, positions.sin)
        y = _attend(q, k, v, positions.mask, grouped=self.config.n_kv_heads < self.config.n_heads)
        return self.out(rearrange(y, "B h T c -> B T (h c)"))


class MultiHeadLatentAttention(nn.Module):
    """Keys and values of all heads come from one small latent; one rotated key part is shared by the heads."""

    def __init__(self, config: MLAConfig, d_model: int, norm_eps: float) -> None:
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

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """`[B, T, d]` -> `[B, T, d]`."""
        c = self.config
        q = self.q_up(self.q_norm(self.q_down(x)) if c.q_lora_rank else x)
        q = rearrange(q, "B T (h c) -> B h T c", h=c.n_heads)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_down(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        kv = rearrange(self.kv_up(self.kv_norm(latent)), "B T (h c) -> B h T c", h=c.n_heads)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        k_rope = rotate(k_rope.unsqueeze(1), positions.cos, positions.sin).expand(-1, c.n_heads, -1, -1)
        q = torch.cat([q_nope, rotate(q_rope, positions.cos, positions.sin)], dim=-1)
        k = torch.cat([k_nope, k_rope], dim=-1)
        y = _attend(q, k, v, positions.mask, grouped=False)
        return self.out(rearrange(y, "B h T c -> B T (h c)"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grouped: bool) -> Tensor:
    """Softmax attention of heads `[B, h, T, c]`, in the type of `v`; values may be narrower than queries and keys."""
    # In bf16 the CPU's kernel (torch 2.13) takes two to three times as long, nearly all of it in the backward.
    dtype = torch.promote_types(v.dtype, torch.float32) if v.device.type == "cpu" else v.dtype
    # Heads of unequal width have no memory-saving kernel; zeros beside the values change nothing.
    padded = F.pad(v, (0, max(0, q.shape[-1] - v.shape[-1])))
    with torch.autocast(v.device.type, enabled=False):
        y = F.scaled_dot_product_attention(
            q.to(dtype), k.to(dtype), padded.to(dtype), attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )
    return y[..., : v.shape[-1]].to(v.dtype)


Attention = GroupedQueryAttention | MultiHeadLatentAttention


def build_attention(config: GQAConfig | MLAConfig, d_model: int, norm_eps: float) -> Attention:
    """The attention that a config names, called with `(x [B, T, d], Positions)`."""
    if isinstance(config, GQAConfig):
        return GroupedQueryAttention(config, d_model, norm_eps)
    return MultiHeadLatentAttention(config, d_model, norm_eps)
