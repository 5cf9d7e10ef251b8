"""`fuse_memory` for CUDA, in Triton (equations and reference: engram/kernels/fusion.py).

Gates are sums over all of D, known before anything can be written, and taps need the scales of earlier tokens. So each
program walks along time, over a segment, in steps of a few tokens: it reads h, k and v for a step's gates, then h and v
again, which it finds in the cache, for the step's results. Taps find their scales on the program's own shelf, where it
put them earlier in its walk. Only before its first token there is a halo, of (taps - 1) dilation tokens of the same
sequence, whose scales it computes as well, rather than wait for the program whose tokens they are: no program reads
what another one writes.

Bytes, in rows of D numbers, of which a token has M in `hidden`, M + 1 in `kv` and M in the result: 3 M + 1 must move.
The walk moves that, and (2 M + 1) halo / segment. One program of 16 warps stays on each processor, so that segments are
as long as can be: 9 tokens before 32, 64, 128 or 256 (4,096 to 32,768 tokens on an H100's 132 processors), for M = 4
1.20, 1.10, 1.05 and 1.02 times the least.

What must stay in the L2 cache meanwhile are the h and v of one step of each program, (M + 1) D numbers a token: at a
step of 8 tokens in bfloat16, 27 MB for D = 2560 and 43 MB for D = 4096, of an H100's 50 MB, and about half of that on
average, as half of the programs have used up what they read. k and the results are marked to leave the cache first.
Steps are as long as that allows, since each reads all weights from L2: 4 M D numbers of taps, for 8 tokens about as
many as the tokens' own h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.kernels.fusion import fuse_memory_reference
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
        fuse_taps(
            out, alpha, stats, hidden, kv, query_norm, key_norm, conv_norm.contiguous(), conv_weight.contiguous(),
            documents, dense(past_values) if past else None, dense(past_scales) if past else None,
            eps, squash, dilation, residual,
        )  # fmt: skip
    return out, alpha, stats
