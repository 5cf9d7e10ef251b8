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

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.fusion import fuse_memory_reference
from engram.kernels.triton.fusion_taps import SIZES, document_of, left_to_torch, links_of, seen_scale, seen_values
from engram.kernels.triton.launch import Walk, dense, sigmoid


@triton.jit
def _gates(
    hidden, kv, query_norm, key_norm, n, valid, m, eps, root, M: tl.constexpr, D: tl.constexpr, SQUASH: tl.constexpr,
    STEP: tl.constexpr, BRANCHES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gates of tokens n and branches m, and what `stats` keeps beside: each [tokens, branches]."""
    n_wide = n.to(tl.int64)
    both = valid[:, None] & (m < M)[None, :]
    first = tl.arange(0, WIDTH)
    h_at = hidden + ((n_wide[:, None] * M + m[None, :]) * D)[:, :, None] + first[None, None, :]
    k_at = kv + (n_wide[:, None] * ((M + 1) * D) + m[None, :] * D)[:, :, None] + first[None, None, :]
    v_at = kv + (n_wide * ((M + 1) * D) + M * D)[:, None] + first[None, :]
    # The weights once for each token, though the same: so they come in the layout of h and k, from the L1 cache, where
    # otherwise each would go through shared memory, with a barrier.
    w_at = (n * 0)[:, None, None] + (m * D)[None, :, None] + first[None, None, :]
    hh = tl.zeros([STEP, BRANCHES, WIDTH], tl.float32)
    kk = tl.zeros([STEP, BRANCHES, WIDTH], tl.float32)
    hk = tl.zeros([STEP, BRANCHES, WIDTH], tl.float32)
    vv = tl.zeros([STEP, WIDTH], tl.float32)
    for d0 in tl.range(0, D, WIDTH, loop_unroll_factor=4):
        d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d0 + first < D
        mask = both[:, :, None] & d_in[None, None, :]
        h = tl.load(h_at + d0, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_at + d0, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        v = tl.load(v_at + d0, mask=valid[:, None] & d_in[None, :], other=0.0).to(tl.float32)
        query = tl.load(query_norm + w_at + d0, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        key = tl.load(key_norm + w_at + d0, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        hh += h * h
        kk += k * k
        hk += h * k * (query * key)
        vv += v * v
    dot = tl.sum(hk, 2)
    inv_h = tl.rsqrt(tl.sum(hh, 2) / D + eps)
    inv_k = tl.rsqrt(tl.sum(kk, 2) / D + eps)
    g = dot * inv_h * inv_k * root
    if SQUASH:
        size = tl.sqrt(tl.maximum(tl.abs(g), 1e-6))
        g = tl.where(g > 0, size, tl.where(g < 0, -size, g))
    a = sigmoid(g)
    inv_u = tl.rsqrt(a * a * (tl.sum(vv, 1) / D)[:, None] + eps)
    return a, dot, inv_h, inv_k, inv_u


@triton.jit
def _results(
    hidden, kv, conv_norm, conv_weight, documents, past_values, past_scales, alpha, shelf, at, out, n, valid, T, past,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, RESIDUAL: tl.constexpr,
    STEP: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """alpha v + SiLU(convolution), and h, of tokens n, whose scales lie in rows `at` of the shelf."""
    n_wide = n.to(tl.int64)
    document = document_of(documents, n, valid, T, past)
    shown = valid & (document >= 0)
    link = links_of(documents, document, n, valid, T, past, TAPS, DILATION)
    for d0 in range(0, D, WIDTH):
        d = d0 + tl.arange(0, WIDTH)
        d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d < D
        mask = valid[:, None] & d_in[None, :]
        w_at = (n * 0)[:, None] + d[None, :]  # in the layout of h, as above
        v_at = (n_wide * ((M + 1) * D) + M * D)[:, None] + d[None, :]
        v = tl.load(kv + v_at, mask=mask, other=0.0).to(tl.float32)
        seen = ()
        for j in tl.static_range(TAPS - 1):
            back = (TAPS - 1 - j) * DILATION
            seen = seen + (seen_values(kv, past_values, n, link, j, back, d, d_in, T, past, M, D),)
        seen = seen + (v,)
        hs = ()
        for m in tl.static_range(M if RESIDUAL else 0):  # all asked for before the first result is stored
            at_h = ((n_wide * M + m) * D)[:, None] + d[None, :]
            hs = hs + (tl.load(hidden + at_h, mask=mask, other=0.0, eviction_policy="evict_first"),)
        for m in tl.static_range(M):
            row = n_wide * M + m
            y = tl.load(alpha + row, mask=shown, other=0.0)[:, None] * v
            if RESIDUAL:
                y += hs[m].to(tl.float32)
            if TAPS > 0:
                z = tl.zeros([STEP, WIDTH], tl.float32)
                for j in tl.static_range(TAPS):
                    s = seen_scale(shelf, past_scales, n, at, link, j, (TAPS - 1 - j) * DILATION, m, T, past, M)
                    weight = tl.load(conv_weight + w_at + (j * M + m) * D, mask=mask, eviction_policy="evict_last")
                    z += weight.to(tl.float32) * (s[:, None] * seen[j])
                z *= tl.load(conv_norm + w_at + m * D, mask=mask, eviction_policy="evict_last").to(tl.float32)
                y += z * sigmoid(z)
            tl.store(
                out + (row * D)[:, None] + d[None, :], y.to(out.dtype.element_ty), mask=mask,
                eviction_policy="evict_first",
            )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "segment"])
def _walk_kernel(
    hidden, kv, query_norm, key_norm, conv_norm, conv_weight, documents, past_values, past_scales,
    out, alpha, stats, shelves, N, T, past, segment, eps, root,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    SQUASH: tl.constexpr, RESIDUAL: tl.constexpr, STEP: tl.constexpr, BRANCHES: tl.constexpr,
    GATE_WIDTH: tl.constexpr, EVEN_GATES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Results, gates and stats of a segment, step after step; segments may begin and end within a sequence."""
    first = tl.program_id(0) * segment
    end = tl.minimum(first + segment, N)
    m = tl.arange(0, BRANCHES)
    REACH: tl.constexpr = (TAPS - 1) * DILATION if TAPS > 0 else 0
    halo = tl.minimum(first % T, REACH)  # of other sequences nothing is needed
    shelf = shelves
    if TAPS > 0:
        shelf = shelves + tl.program_id(0).to(tl.int64) * ((REACH + segment) * M)
    start = first - (halo + STEP - 1) // STEP * STEP
    while start < end:  # the interpreter takes no such numbers for a range
        n = start + tl.arange(0, STEP)
        valid = (n >= first - halo) & (n < end)
        a, dot, inv_h, inv_k, inv_u = _gates(
            hidden, kv, query_norm, key_norm, n, valid, m, eps, root, M, D, SQUASH,
            STEP, BRANCHES, GATE_WIDTH, EVEN_GATES,
        )  # fmt: skip
        own = (valid & (n >= first))[:, None] & (m < M)[None, :]
        row = n.to(tl.int64)[:, None] * M + m[None, :]
        tl.store(alpha + row, a, mask=own)
        tl.store(stats + row * 4, dot, mask=own)
        tl.store(stats + row * 4 + 1, inv_h, mask=own)
        tl.store(stats + row * 4 + 2, inv_k, mask=own)
        tl.store(stats + row * 4 + 3, inv_u, mask=own)
        at = n - first + REACH
        if TAPS > 0:
            shown = document_of(documents, n, valid, T, past) >= 0
            scale = tl.where(shown[:, None], a * inv_u, 0.0)
            tl.store(shelf + at[:, None] * M + m[None, :], scale, mask=valid[:, None] & (m < M)[None, :])
        tl.debug_barrier()  # each thread sees the gates and scales that all have stored
        if start >= first:
            _results(
                hidden, kv, conv_norm, conv_weight, documents, past_values, past_scales, alpha, shelf, at, out,
                n, valid, T, past, M, D, TAPS, DILATION, RESIDUAL, STEP, WIDTH, EVEN,
            )  # fmt: skip
        start += STEP


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
    B, T, M, D = hidden.shape
    N, taps = B * T, 0 if conv_weight is None else len(conv_weight)
    past = 0 if past_values is None else past_values.shape[1]
    hidden, kv = hidden.contiguous(), kv.contiguous()
    out = torch.empty_like(hidden)
    alpha = hidden.new_empty(B, T, M, dtype=torch.float32)
    stats = hidden.new_empty(B, T, M, 4, dtype=torch.float32)
    if not N:
        return out, alpha, stats
    walk = Walk.of(N, M, D, hidden.element_size(), hidden.device)
    reach = max(taps - 1, 0) * dilation
    shelves = hidden.new_empty(walk.programs, reach + walk.segment, M, dtype=torch.float32) if taps else None
    _walk_kernel[(walk.programs,)](
        hidden, kv, query_norm.contiguous(), key_norm.contiguous(), dense(conv_norm), dense(conv_weight),
        dense(documents), dense(past_values) if past else None, dense(past_scales) if past else None,
        out, alpha, stats, shelves, N, T, past, walk.segment, eps, 1 / math.sqrt(D),
        M=M, D=D, TAPS=taps, DILATION=dilation, SQUASH=squash, RESIDUAL=residual, STEP=walk.step,
        BRANCHES=walk.branches, GATE_WIDTH=walk.gate_width, EVEN_GATES=D % walk.gate_width == 0,
        WIDTH=walk.width, EVEN=D % walk.width == 0, num_warps=16,
    )  # fmt: skip
    return out, alpha, stats
