"""Causal self-attention within documents: grouped-query (arXiv:2305.13245) and multi-head latent (arXiv:2405.04434).

Both go through `scaled_dot_product_attention`, or on the CPU through a kernel that takes half its time. What depends on
positions alone, angles and mask, is made once per forward pass and shared by all blocks.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engram.backbone.norm import RMSNorm
from engram.backbone.positions import BlockCache, Documents, Places, Positions
from engram.config import GQAConfig, MLAConfig
from engram.kernels import attention, has_attention, norm_rotate


class GroupedQueryAttention(nn.Module):
    """Query heads in groups that share a key and value head; queries and keys RMS-normalised per head if configured."""

    def __init__(self, config: GQAConfig, d_model: int, norm_eps: float, output_scale: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
        self.qkv = nn.Linear(d_model, sum(self.heads) * config.head_dim, bias=False)
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
        q, k, v = self._heads(x, positions)
        return self.out(_attend(q, k, v, positions).flatten(2))

    def step(self, x: Tensor, places: Places, cache: BlockCache) -> Tensor:
        """As `forward` for T tokens `[B, T, d]` that follow those of `cache`, which keeps their keys and values."""
        q, k, v = self._heads(x, places)
        keys, values = cache.extend(places, k, v)
        y = _attend(q, k, v, places.alone) if places.alone else _attend_to(q.to(v.dtype), keys, values, places.visible)
        return self.out(y.flatten(2))

    def _heads(self, x: Tensor, at: Positions | Places) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, T, h, c]`, normed and turned."""
        heads = rearrange(self.qkv(x), "B T (h c) -> B T h c", c=self.config.head_dim)
        q, k, v = heads.split(self.heads, dim=2)
        return _turn(q, at, self.q_norm), _turn(k, at, self.k_norm), v


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
        return self._expanded(*self._queries(x, positions), *self._latent(x, positions), positions)

    def step(self, x: Tensor, places: Places, cache: BlockCache) -> Tensor:
        """As `forward` for T tokens `[B, T, d]` that follow those of `cache`, which keeps their latents.

        Keys and values are not made of the latents: with W_k and W_v the parts of W that would, scores are
        (W_k^T q) . latent, and the output is W_v times the weighted sum of latents (arXiv:2405.04434, section 2.1.2).
        """
        c = self.config
        q_nope, q_rope = self._queries(x, places)
        latent, k_rope = self._latent(x, places)
        (kept,) = cache.extend(places, torch.cat([latent.unsqueeze(2), k_rope.to(latent.dtype)], dim=-1))
        if places.alone:
            return self._expanded(q_nope, q_rope, latent, k_rope, places.alone)
        w_k, w_v = self._up_map(latent).split([c.qk_nope_head_dim, c.v_head_dim], dim=1)
        q_latent = torch.einsum("bthn,hnr->bthr", q_nope, w_k)
        q = torch.cat([q_latent, q_rope.to(q_latent.dtype)], dim=-1)
        scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
        y = _attend_to(q, kept, kept[..., : c.kv_lora_rank], places.visible, scale)
        return self.out(torch.einsum("bthr,hvr->bthv", y, w_v).flatten(2))

    def _up_map(self, latent: Tensor) -> Tensor:
        """W `[h, c, r]` of `kv_up`, whatever has taken its place, such as an adapter around it."""
        c = self.config
        if type(self.kv_up) is nn.Linear:
            W = self.kv_up.weight
        else:
            W = self.kv_up(torch.eye(c.kv_lora_rank, dtype=latent.dtype, device=latent.device)).T
        return W.reshape(c.n_heads, -1, c.kv_lora_rank)

    def _queries(self, x: Tensor, at: Positions | Places) -> tuple[Tensor, Tensor]:
        """The parts of queries `[B, T, h, c]` without position, and turned by theirs."""
        c = self.config
        q = self.q_up(self.q_norm(self.q_down(x)) if c.q_lora_rank else x)
        if at.query_scale != 1.0:
            q = q * at.query_scale
        q = rearrange(q, "B T (h c) -> B T h c", h=c.n_heads)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], dim=-1)
        return q_nope, _turn(q_rope, at)

    def _latent(self, x: Tensor, at: Positions | Places) -> tuple[Tensor, Tensor]:
        """The normed latent `[B, T, r]`, and the turned key part `[B, T, 1, c]`."""
        c = self.config
        latent, k_rope = self.kv_down(x).split([c.kv_lora_rank, c.qk_rope_head_dim], dim=-1)
        return self.kv_norm(latent), _turn(k_rope.unsqueeze(2), at)

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, positions: Positions) -> Tensor:
        """The output, by way of all heads' keys and values."""
        c = self.config
        kv = rearrange(self.kv_up(latent), "B T (h c) -> B T h c", h=c.n_heads)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope.expand(-1, -1, c.n_heads, -1)], dim=-1)
        return self.out(_attend(q, k, v, positions).flatten(2))


def _draw_maps(attention: Attention, output_scale: float) -> None:
    """N(0, 1/fan-in) for all maps, the output's times `output_scale`."""
    for linear in attention.children():
        if isinstance(linear, nn.Linear):
            scale = output_scale if linear is attention.out else 1.0
            nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5)


def _turn(heads: Tensor, at: Positions | Places, norm: RMSNorm | None = None) -> Tensor:
    """Heads `[B, T, h, c]`, normed if there is a norm, turned by their positions' angles."""
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    if isinstance(at, Positions):
        return norm_rotate(heads, weight, at.cos, at.sin, eps)
    each = heads.flatten(0, 1).unsqueeze(0)  # every token of every row has a position of its own
    return norm_rotate(each, weight, at.cos, at.sin, eps).view(heads.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, positions: Positions) -> Tensor:
    """Softmax attention of heads `[B, T, h, c]`; values may be narrower than queries and keys."""
    documents = positions.documents
    with torch.autocast(v.device.type, enabled=False):
        if has_attention(v.device.type):
            return attention(q, k, v, None if documents is None else documents.starts())
        # Heads of unequal width have no memory-saving kernel; zeros beside the values change nothing.
        padded = F.pad(v, (0, max(0, q.shape[-1] - v.shape[-1])))
        q, k, each = q.to(v.dtype), k.to(v.dtype), q.shape[2] // k.shape[2]
        # With documents, kernels of CUDA take as many keys as queries: those of torch 2.11 that know where documents
        # end, and those that take a mask and don't keep all scores.
        if documents is not None and each > 1:
            k, padded, each = k.repeat_interleave(each, 2), padded.repeat_interleave(each, 2), 1
        if documents is not None and _packs(q):
            return _attend_packed(q, k, padded, documents)[..., : v.shape[-1]]
        mask = None if documents is None else documents.mask()
        q, k, padded = (x.transpose(1, 2) for x in (q, k, padded))
        y = F.scaled_dot_product_attention(q, k, padded, mask, is_causal=mask is None, enable_gqa=each > 1)
        return y[..., : v.shape[-1]].transpose(1, 2)


def _packs(q: Tensor) -> bool:
    """Whether flash attention takes documents of unequal length here: each is attended to alone, with no mask.

    Not in compiled graphs, whose shapes can't depend on how many documents there are.
    """
    low = q.dtype in (torch.bfloat16, torch.float16)
    return q.device.type == "cuda" and low and q.shape[-1] % 8 == 0 and not torch.compiler.is_compiling()


def _attend_packed(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """As `_attend`, of as many heads of one type and width, document by document."""
    from torch.nn.attention.varlen import varlen_attn

    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bounds, longest = documents.bounds()
    y = cast(Tensor, varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=(-1, 0)))
    return y.view(*shape[:3], -1)


def _attend_to(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None) -> Tensor:
    """Softmax attention of `[B, T, h, c]` on what is kept, keys and values `[B, S, g, c]` of any type, where visible
    `[B, 1, T, S]`; in the type of `q`."""
    with torch.autocast(v.device.type, enabled=False):
        B, T, h, c = q.shape
        g, each = k.shape[2], h // k.shape[2]
        # Queries that share a key stand below each other, as if they were more tokens: no key is repeated for them.
        q = q.view(B, T, g, each, c).transpose(1, 2).reshape(B, g, T * each, c)
        visible = visible.unsqueeze(3).expand(-1, -1, -1, each, -1).flatten(2, 3)
        k, v = (x.to(q.dtype).transpose(1, 2) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, visible, scale=scale)
        return y.view(B, g, T, each, -1).transpose(1, 2).flatten(2, 3)


Attention = GroupedQueryAttention | MultiHeadLatentAttention


def build_attention(
    config: GQAConfig | MLAConfig, d_model: int, norm_eps: float, output_scale: float = 1.0
) -> Attention:
    """The attention that a config names, called with `(x [B, T, d], Positions)`; its output map starts times
    `output_scale`."""
    if isinstance(config, GQAConfig):
        return GroupedQueryAttention(config, d_model, norm_eps, output_scale)
    return MultiHeadLatentAttention(config, d_model, norm_eps, output_scale)
