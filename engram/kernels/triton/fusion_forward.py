"""`fuse_memory` for CUDA, in Triton (equations and reference: engram/kernels/fusion.py).

Bytes, in rows of D numbers, of which a token has M in `hidden`, M + 1 in `kv` and M in the result: 3 M + 1 must move,
and that is what moves. Gates are sums over all of D, known before anything can be written, so that h and v are read
twice, the second time from a cache, in one launch:

    no convolution    a token's program finds them in the L1 cache                        fusion_forward_tokens.py
    convolution       other programs find them in the L2 cache, some 200 tokens later     fusion_forward_taps.py
      up to `dilation` tokens of a sequence, as in decoding: kept in registers            fusion_forward_steps.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.kernels.fusion import fuse_memory_reference
from engram.kernels.triton.fusion_forward_steps import fuse_steps
from engram.kernels.triton.fusion_forward_taps import fuse_taps
from engram.kernels.triton.fusion_forward_tokens import fuse_tokens
from engram.kernels.triton.fusion_taps import left_to_torch
from engram.kernels.triton.launch import dense


def fuse_memory_triton(
    hidden: Tensor,
    kv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor | None,
    conv_weight: Tensor | None,
    documents: Tensor | None,
    past_values: Tensor | None,
    past_scales: Tensor | None,
    eps: float,
    squash: bool,
    dilation: int,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fuse_memory_reference`."""
    if left_to_torch(hidden, kv, conv_weight):
        return fuse_memory_reference(
            hidden, kv, query_norm, key_norm, conv_norm, conv_weight, documents, past_values, past_scales,
            eps, squash, dilation, residual,
        )  # fmt: skip
    B, T, M = hidden.shape[:3]
    past = 0 if past_values is None else past_values.shape[1]
    hidden, kv = hidden.contiguous(), kv.contiguous()
    out = torch.empty_like(hidden)
    alpha = hidden.new_empty(B, T, M, dtype=torch.float32)
    stats = hidden.new_empty(B, T, M, 4, dtype=torch.float32)
    if not out.numel():
        return out, alpha, stats
    query_norm, key_norm, documents = query_norm.contiguous(), key_norm.contiguous(), dense(documents)
    if conv_weight is None or conv_norm is None:
        fuse_tokens(out, alpha, stats, hidden, kv, query_norm, key_norm, documents, past, eps, squash, residual)
    else:
        # No tap sees another token of the call where they all reach further back than its first.
        fuse = fuse_steps if dilation >= T else fuse_taps
        fuse(
            out, alpha, stats, hidden, kv, query_norm, key_norm, conv_norm.contiguous(), conv_weight.contiguous(),
            documents, dense(past_values) if past else None, dense(past_scales) if past else None,
            eps, squash, dilation, residual,
        )  # fmt: skip
    return out, alpha, stats
