"""Gates of `fuse_memory`, and all of it without a convolution, token by token (reference: engram/kernels/fusion.py).

Gates are sums over all of D, known before anything can be written. A program takes a token, each of its warps a branch:
so a warp has all that its sums need, and waits for no other. It reads its rows of h and k, and v, which the branches
share in the L1 cache, then h and v once more, from there. Many programs on a processor keep device memory busy while
some are at their second reading.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.device import sigmoid
from engram.kernels.triton.fusion_taps import SIZES, document_of
from engram.kernels.triton.launch import Gates, at_most

_REGISTERS = 128  # of a thread, so that 16 warps run on a processor


@triton.jit
def store_numbers(into, x, m, m_in, STRIDE: tl.constexpr):
    """Stores a number for each branch, by the first thread of its warp, so that no warp waits for another."""
    lane = tl.arange(0, 32)[None, :]
    x = tl.broadcast_to(x[:, None], [x.shape[0], 32])
    tl.store(into + m[:, None] * STRIDE + lane, x, mask=m_in[:, None] & (lane == 0))


@triton.jit
def gate_of(dot, hh, kk, vv, eps, root, D: tl.constexpr, SQUASH: tl.constexpr):
    """Gates, and the scales that their norms have found, given the sums over D."""
    inv_h = tl.rsqrt(hh / D + eps)
    inv_k = tl.rsqrt(kk / D + eps)
    g = dot * inv_h * inv_k * root
    if SQUASH:
        size = tl.sqrt(tl.maximum(tl.abs(g), 1e-6))
        g = tl.where(g > 0, size, tl.where(g < 0, -size, g))
    a = sigmoid(g)
    return a, inv_h, inv_k, tl.rsqrt(a * a * (vv / D) + eps)


@triton.jit
def store_gates(
    hidden, kv, query_norm, key_norm, alpha, stats, n, eps, root, M: tl.constexpr, D: tl.constexpr,
    SQUASH: tl.constexpr, BRANCHES: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Stores gates and stats of token n; returns its gates and their scales of values, [branches] each.

    Of norms only their product enters: it may come as `query_norm`, with None for the other.
    """
    EVEN: tl.constexpr = D % (WIDTH * AHEAD) == 0
    m = tl.arange(0, BRANCHES)
    m_in = tl.full([BRANCHES], True, tl.int1) if M == BRANCHES else m < M
    first = tl.arange(0, WIDTH)
    row = tl.cast(n, tl.int64) * M
    k_row = tl.cast(n, tl.int64) * (M + 1)
    at = (m * D)[:, None] + first[None, :]
    v_at = (m * 0)[:, None] + first[None, :]  # once for each branch, so that it comes in the layout of h and k
    hh = tl.zeros([BRANCHES, WIDTH], tl.float32)
    kk = tl.zeros([BRANCHES, WIDTH], tl.float32)
    hk = tl.zeros([BRANCHES, WIDTH], tl.float32)
    vv = tl.zeros([BRANCHES, WIDTH], tl.float32)
    for d0 in range(0, D, WIDTH * AHEAD):
        masks = ()
        hs = ()
        ks = ()
        vs = ()
        for part in tl.static_range(AHEAD):  # all asked for before the first is waited for
            d = d0 + part * WIDTH
            d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d + first < D
            mask = m_in[:, None] & d_in[None, :]
            masks = masks + (mask,)
            hs = hs + (tl.load(hidden + row * D + d + at, mask=mask, other=0.0),)
            ks = ks + (tl.load(kv + k_row * D + d + at, mask=mask, other=0.0, eviction_policy="evict_first"),)
            vs = vs + (tl.load(kv + (k_row + M) * D + d + v_at, mask=mask, other=0.0),)
        for part in tl.static_range(AHEAD):
            d = d0 + part * WIDTH
            norm = tl.load(query_norm + d + at, mask=masks[part], other=0.0, eviction_policy="evict_last").to(
                tl.float32
            )
            if key_norm is not None:
                key = tl.load(key_norm + d + at, mask=masks[part], other=0.0, eviction_policy="evict_last")
                norm *= key.to(tl.float32)
            h, k, v = hs[part].to(tl.float32), ks[part].to(tl.float32), vs[part].to(tl.float32)
            hh += h * h
            kk += k * k
            hk += h * k * norm
            vv += v * v
    dot = tl.sum(hk, 1)
    a, inv_h, inv_k, inv_u = gate_of(dot, tl.sum(hh, 1), tl.sum(kk, 1), tl.sum(vv, 1), eps, root, D, SQUASH)
    store_numbers(alpha + row, a, m, m_in, 1)
    store_numbers(stats + row * 4, dot, m, m_in, 4)
    store_numbers(stats + row * 4 + 1, inv_h, m, m_in, 4)
    store_numbers(stats + row * 4 + 2, inv_k, m, m_in, 4)
    store_numbers(stats + row * 4 + 3, inv_u, m, m_in, 4)
    return a, a * inv_u


@triton.jit(do_not_specialize=SIZES)
def _tokens_kernel(
    hidden, kv, query_norm, key_norm, documents, out, alpha, stats, N, T, past, eps, root,
    M: tl.constexpr, D: tl.constexpr, SQUASH: tl.constexpr, RESIDUAL: tl.constexpr,
    BRANCHES: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """alpha v, and h, of a token."""
    EVEN: tl.constexpr = D % (WIDTH * AHEAD) == 0
    n = tl.program_id(0)
    m = tl.arange(0, BRANCHES)
    m_in = tl.full([BRANCHES], True, tl.int1) if M == BRANCHES else m < M
    first = tl.arange(0, WIDTH)
    at = (m * D)[:, None] + first[None, :]
    v_at = (m * 0)[:, None] + first[None, :]
    a, _ = store_gates(
        hidden, kv, query_norm, key_norm, alpha, stats, n, eps, root, M, D, SQUASH, BRANCHES, WIDTH, AHEAD
    )
    used = tl.where(document_of(documents, n, True, T, past) >= 0, a, 0.0)
    row = tl.cast(n, tl.int64) * M
    v_row = tl.cast(n, tl.int64) * (M + 1) + M
    for d0 in range(0, D, WIDTH * AHEAD):
        masks = ()
        hs = ()
        vs = ()
        for part in tl.static_range(AHEAD):
            d = d0 + part * WIDTH
            d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d + first < D
            mask = m_in[:, None] & d_in[None, :]
            masks = masks + (mask,)
            if RESIDUAL:
                h = tl.load(hidden + row * D + d + at, mask=mask, other=0.0, eviction_policy="evict_first")
                hs = hs + (h,)
            vs = vs + (tl.load(kv + v_row * D + d + v_at, mask=mask, other=0.0, eviction_policy="evict_first"),)
        for part in tl.static_range(AHEAD):
            y = used[:, None] * vs[part].to(tl.float32)
            if RESIDUAL:
                y += hs[part].to(tl.float32)
            tl.store(
                out + row * D + d0 + part * WIDTH + at, y.to(out.dtype.element_ty), mask=masks[part],
                eviction_policy="evict_first",
            )  # fmt: skip


def fuse_tokens(
    out: Tensor,
    alpha: Tensor,
    stats: Tensor,
    hidden: Tensor,
    kv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    documents: Tensor | None,
    past: int,
    eps: float,
    squash: bool,
    residual: bool,
) -> None:
    """Fills the first three with what `fuse_memory` gives without a convolution."""
    B, T, M, D = hidden.shape
    gates = Gates.of(M, D, [hidden, kv, query_norm, key_norm])
    _tokens_kernel[(B * T,)](
        hidden, kv, query_norm, key_norm, documents, out, alpha, stats, B * T, T, past, eps, 1 / math.sqrt(D),
        M=M, D=D, SQUASH=squash, RESIDUAL=residual, BRANCHES=gates.branches, WIDTH=gates.width, AHEAD=gates.ahead,
        num_warps=gates.warps, **at_most(_REGISTERS),
    )  # fmt: skip
