"""The backward of `fuse_memory` for CUDA, in Triton (equations and reference: engram/kernels/fusion.py).

Bytes, in rows of D numbers, of which a token has M in `hidden` and M + 1 in `kv`: 5 M + 2 must move. Without a
convolution that is what moves. With one, a token's gradients need sums over all of D of what later tokens hand back to
it, and so two kinds of work:

    taps         gy, v -> r, one row for all branches                M + 2
    gradients    gy, v, r, h, k -> grad_h, grad_k, grad_v            5 M + 3

They take turns within one launch, so that gy, v and r need not come from memory again, nor r go there: between the taps
of a chunk of tokens and its gradients lie some hundred tokens, of 2 (M + 2) D bytes in bfloat16. What else is kept is
small: a few numbers for each token and branch; sums over D in parts, one from each block of channels; sums for the
gradients of parameters, in registers over a chunk.

One program for all of a token, as without a convolution, would need taps M D of those, 160 to 256 KB for M = 4, more
than a processor's registers hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.kernels.fusion import fuse_memory_backward_reference
from engram.kernels.triton.fusion_backward_tokens import token_gradients
from engram.kernels.triton.fusion_backward_turns import gradients_in_turns
from engram.kernels.triton.fusion_taps import left_to_torch
from engram.kernels.triton.launch import dense
from engram.tensors import widen


def fuse_memory_backward_triton(
    grad_out: Tensor,
    grad_alpha: Tensor | None,
    hidden: Tensor,
    kv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor | None,
    conv_weight: Tensor | None,
    documents: Tensor | None,
    past_values: Tensor | None,
    past_scales: Tensor | None,
    alpha: Tensor,
    stats: Tensor,
    eps: float,
    squash: bool,
    dilation: int,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `fuse_memory_backward_reference`."""
    if left_to_torch(hidden, kv, conv_weight) or not hidden.numel():
        return fuse_memory_backward_reference(
            grad_out, grad_alpha, hidden, kv, query_norm, key_norm, conv_norm, conv_weight, documents, past_values,
            past_scales, alpha, stats, eps, squash, dilation, residual,
        )  # fmt: skip
    past = 0 if past_values is None else past_values.shape[1]
    grad_out, hidden, kv, documents = grad_out.contiguous(), hidden.contiguous(), kv.contiguous(), dense(documents)
    alpha, stats, grad_alpha = alpha.contiguous(), stats.contiguous(), dense(grad_alpha)
    grad_kv = torch.empty_like(kv)
    grad_norm = grad_weight = query_norm.new_empty(0)
    rest = (
        grad_out, grad_alpha, hidden, kv, query_norm.contiguous(), key_norm.contiguous(), documents, past, alpha,
        stats, squash, residual,
    )  # fmt: skip
    if conv_weight is None or conv_norm is None:
        grad_hidden, gate_sums = token_gradients(grad_kv, *rest)
    else:
        past_values, past_scales = (dense(past_values), dense(past_scales)) if past else (None, None)
        conv = (widen(conv_weight) * widen(conv_norm)).contiguous()
        grad_hidden, gate_sums, tap_sums = gradients_in_turns(
            grad_kv, *rest, conv, past_values, past_scales, eps, dilation
        )
        per_tap = tap_sums.sum(0).transpose(0, 1)
        grad_norm = (per_tap * widen(conv_weight)).sum(0).to(conv_norm.dtype)
        grad_weight = (per_tap * widen(conv_norm)).to(conv_weight.dtype)
    grad_both = gate_sums.sum(0)
    return (
        grad_hidden,
        grad_kv,
        (grad_both * widen(key_norm)).to(query_norm.dtype),
        (grad_both * widen(query_norm)).to(key_norm.dtype),
        grad_norm,
        grad_weight,
    )
