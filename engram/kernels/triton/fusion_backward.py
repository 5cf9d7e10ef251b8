"""The backward of `fuse_memory` for CUDA, in Triton (equations and reference: engram/kernels/fusion.py).

Bytes, in rows of D numbers, of which a token has M in `hidden` and M + 1 in `kv`: 5 M + 2 must move. Without a
convolution that is what moves; with one 6 M + 5, in two passes, since a token's gradients need sums over all of D of
what later tokens hand back to it:

    taps      gy, v -> r, one row for all branches               M + 2
    blocks    gy, v, r, h, k -> grad_h, grad_k, grad_v           5 M + 3

What else is kept is small: a few numbers for each token and branch, the sums over D in parts, one from each block of
channels of the first pass, and sums for the gradients of parameters, which stay in registers over a run of tokens.
Those stand in the way of one pass: a program that walks over whole rows, as that without a convolution, would need taps
M D of them, 160 to 256 KB for M = 4, more than a processor's registers hold. There are no atomics: the same inputs give
the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.kernels.fusion import fuse_memory_backward_reference
from engram.kernels.triton.fusion_backward_blocks import block_gradients
from engram.kernels.triton.fusion_backward_taps import hand_back
from engram.kernels.triton.fusion_backward_tokens import token_gradients
from engram.kernels.triton.fusion_taps import left_to_torch
from engram.kernels.triton.launch import dense
from engram.kernels.triton.parts import product, product_gradients


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
        conv = product(conv_weight, conv_norm)
        dots, tap_sums = hand_back(
            grad_kv, grad_out, kv, conv, documents, past_values, past_scales, alpha, stats, eps, dilation
        )
        grad_hidden, gate_sums = block_gradients(grad_kv, dots, *rest)
        grad_norm, grad_weight = product_gradients(tap_sums, conv_norm, conv_weight)
    return grad_hidden, grad_kv, *product_gradients(gate_sums, query_norm, key_norm), grad_norm, grad_weight
