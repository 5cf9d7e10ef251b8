"""`fuse_memory` and its backward for CUDA, in Triton (equations and reference: engram/kernels/fusion.py).

Bytes, in rows of D numbers, of which a token has M in `hidden`, M + 1 in `kv` and M in the result:

                          must move   moved
    forward, no taps       3 M + 1    3 M + 1   in one pass, whose second look at h and v is meant for the L2 cache
    forward                3 M + 1    4 M + 2   gates: h, k, v. Then output: h, v -> out
    backward, no taps      5 M + 2    6 M + 3   sums: gy, v. Then gradients: gy, h, k, v -> grad_h, grad_k, grad_v
    backward               5 M + 2    8 M + 3   sums: gy, v -> grad_z. Then gradients: gy, grad_z, h, k, v -> the same

Gates are sums over all of D, known before anything can be written, and taps need the gates of earlier tokens: hence two
passes each way. What else is kept is small: a few numbers for each token and branch, and sums for the gradients of
parameters, which stay in registers over a run of tokens. Storing grad_z costs 2 M: made anew in the second pass it
would take, for each number, as many sigmoids and sums over taps as there are taps, and the first pass is bound by
instructions already. The second pass goes through the tokens backwards, to meet in the L2 cache what the first has left
there. There are no atomics: the same inputs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.fusion import fuse_memory_backward_reference, fuse_memory_reference
from engram.kernels.triton.launch import Strip, Tile, ceil_div, dense, sigmoid
from engram.tensors import widen

_SIZES = ["N", "T", "past"]  # compiled once for all values
_TAPS_LIMIT = 15  # of a token's links, one for each tap in either half of 31 bits
_UNROLL = tl.constexpr(4)


@triton.jit
def _prepare(
    documents, links, used, scales, n, row, both, valid, a, inv_u, T, past, TAPS: tl.constexpr, DILATION: tl.constexpr
):
    """Of tokens n: gates and scales, 0 at padding, and with which of the positions that taps reach they are linked.

    Link j says that tap j finds a token of the same document, link 16 + j that it finds one in the past.
    """
    t = n % T
    now = (n // T).to(tl.int64) * (past + T) + past + t
    if documents is not None:
        document = tl.load(documents + now, mask=valid, other=-1)
        a = tl.where((document >= 0)[:, None], a, 0.0)
    tl.store(used + row, a, mask=both)
    tl.store(scales + row, a * inv_u, mask=both)
    link = n * 0
    for j in tl.static_range(TAPS):
        back = (TAPS - 1 - j) * DILATION
        joined = valid & (t + past >= back)
        if documents is not None:
            joined = joined & (tl.load(documents + now - back, mask=joined, other=0) == document)
        link = link | tl.where(joined, tl.where(t >= back, 1 << j, 1 << (j + 16)), 0)
    tl.store(links + n, link, mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def _prepare_kernel(
    documents, alpha, stats, links, used, scales, N, T, past,
    M: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, TOKENS: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m = tl.arange(0, BRANCHES)
    valid = n < N
    row = n.to(tl.int64)[:, None] * M + m[None, :]
    both = valid[:, None] & (m < M)[None, :]
    a = tl.load(alpha + row, mask=both, other=0.0)
    inv_u = tl.load(stats + row * 4 + 3, mask=both, other=0.0)
    _prepare(documents, links, used, scales, n, row, both, valid, a, inv_u, T, past, TAPS, DILATION)


@triton.jit(do_not_specialize=_SIZES)
def _gate_kernel(
    hidden, kv, gate, documents, out, alpha, stats, links, used, scales, N, T, past, eps, root,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    SQUASH: tl.constexpr, RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr, BRANCHES: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Gates and stats of a block of tokens and, where there are no taps, what becomes of them."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m = tl.arange(0, BRANCHES)
    valid, m_in = n < N, m < M
    row = n.to(tl.int64)[:, None] * M + m[None, :]
    both = valid[:, None] & m_in[None, :]
    first = tl.arange(0, WIDTH)
    h_at = hidden + (row * D)[:, :, None] + first[None, None, :]
    k_at = kv + (n.to(tl.int64)[:, None] * ((M + 1) * D) + m[None, :] * D)[:, :, None] + first[None, None, :]
    v_at = kv + (n.to(tl.int64) * ((M + 1) * D) + M * D)[:, None] + first[None, :]
    # The weights once for each token, though the same: so they come in the layout of h and k, from the L1 cache.
    g_at = gate + (n * 0)[:, None, None] + (m * D)[None, :, None] + first[None, None, :]
    hh = tl.zeros([TOKENS, BRANCHES, WIDTH], tl.float32)
    kk = tl.zeros([TOKENS, BRANCHES, WIDTH], tl.float32)
    hk = tl.zeros([TOKENS, BRANCHES, WIDTH], tl.float32)
    vv = tl.zeros([TOKENS, WIDTH], tl.float32)
    for d0 in tl.range(0, D, WIDTH, loop_unroll_factor=_UNROLL):
        d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d0 + first < D
        mask = both[:, :, None] & d_in[None, None, :]
        h = tl.load(h_at + d0, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(k_at + d0, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        v = tl.load(v_at + d0, mask=valid[:, None] & d_in[None, :], other=0.0).to(tl.float32)
        g = tl.load(g_at + d0, mask=mask, other=0.0, eviction_policy="evict_last")
        hh += h * h
        kk += k * k
        hk += h * k * g
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
    tl.store(alpha + row, a, mask=both)
    tl.store(stats + row * 4, dot, mask=both)
    tl.store(stats + row * 4 + 1, inv_h, mask=both)
    tl.store(stats + row * 4 + 2, inv_k, mask=both)
    tl.store(stats + row * 4 + 3, inv_u, mask=both)
    if TAPS > 0:
        _prepare(documents, links, used, scales, n, row, both, valid, a, inv_u, T, past, TAPS, DILATION)
    else:
        if documents is not None:
            now = (n // T).to(tl.int64) * (past + T) + past + n % T
            a = tl.where((tl.load(documents + now, mask=valid, other=-1) >= 0)[:, None], a, 0.0)
        out_at = out + (row * D)[:, :, None] + first[None, None, :]
        for d0 in tl.range(0, D, WIDTH, loop_unroll_factor=_UNROLL):
            d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d0 + first < D
            mask = both[:, :, None] & d_in[None, None, :]
            v = tl.load(v_at + d0, mask=valid[:, None] & d_in[None, :], other=0.0)
            y = a[:, :, None] * v.to(tl.float32)[:, None, :]
            if RESIDUAL:
                y += tl.load(h_at + d0, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_at + d0, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _seen(kv, past_values, n, n_wide, link, d, d_in, back, bit, N, T, past, valid, M: tl.constexpr, D: tl.constexpr):
    """The values [tokens, width] that a tap sees; without a link whatever lies there, to be scaled by 0."""
    v = tl.load(
        kv + ((n_wide - back) * ((M + 1) * D) + M * D)[:, None] + d[None, :],
        mask=(valid & (n >= back))[:, None] & d_in[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    if past_values is not None:
        in_past = (link >> (bit + 16)) & 1
        slot = (n // T).to(tl.int64) * past + past + n % T - back
        before = tl.load(
            past_values + slot[:, None] * D + d[None, :], mask=(in_past != 0)[:, None] & d_in[None, :], other=0.0
        )
        v = tl.where((in_past != 0)[:, None], before.to(tl.float32), v)
    return v


@triton.jit
def _seen_scale(scales, past_scales, n, n_wide, link, m, back, bit, T, past, M: tl.constexpr):
    """The scales [tokens, 1] of what a tap sees in branch m, 0 where there is no link."""
    s = tl.load(scales + (n_wide - back) * M + m, mask=((link >> bit) & 1) != 0, other=0.0)
    if past_scales is not None:
        slot = (n // T).to(tl.int64) * past + past + n % T - back
        s += tl.load(past_scales + slot * M + m, mask=((link >> (bit + 16)) & 1) != 0, other=0.0).to(tl.float32)
    return s[:, None]


@triton.jit(do_not_specialize=_SIZES)
def _output_kernel(
    hidden, kv, conv, past_values, past_scales, links, used, scales, out, N, T, past,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """alpha v + SiLU(convolution), and h, for one block of channels of a run of tokens."""
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * RUN
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d < D
    weights = ()
    for m in tl.static_range(M):
        for j in tl.static_range(TAPS):
            weights = weights + (tl.load(conv + (j * M + m) * D + d, mask=d_in, other=0.0),)
    for start in range(0, RUN, TOKENS):
        n = first + start + tl.arange(0, TOKENS)
        valid, n_wide = n < N, n.to(tl.int64)
        mask = valid[:, None] & d_in[None, :]
        link = tl.load(links + n, mask=valid, other=0)
        seen = ()
        for j in tl.static_range(TAPS):
            back = (TAPS - 1 - j) * DILATION
            seen = seen + (_seen(kv, past_values, n, n_wide, link, d, d_in, back, j, N, T, past, valid, M, D),)
        for m in tl.static_range(M):
            at = ((n_wide * M + m) * D)[:, None] + d[None, :]
            y = tl.load(used + n_wide * M + m, mask=valid, other=0.0)[:, None] * seen[TAPS - 1]
            if RESIDUAL:
                y += tl.load(hidden + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            z = tl.zeros([TOKENS, WIDTH], tl.float32)
            for j in tl.static_range(TAPS):
                back = (TAPS - 1 - j) * DILATION
                s = _seen_scale(scales, past_scales, n, n_wide, link, m, back, j, T, past, M)
                z += weights[m * TAPS + j][None, :] * (s * seen[j])
            tl.store(out + at, (y + z * sigmoid(z)).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def _sums_kernel(
    grad_out, kv, conv, past_values, past_scales, links, scales, grad_z, dots, tap_sums, N, T, past,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr, RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_z, and sums over some blocks of channels that the gates' gradients need, of one branch and a run of tokens.

    dots [groups of blocks, M, N, taps + 1 and padding]: of grad_z with each tap's weight times the value that it saw,
    then of gy with v. The first are what this token gives to the gradients of the scales at the positions it saw.
    """
    m = tl.program_id(1)
    first = tl.program_id(2) * RUN
    d0 = tl.program_id(0) * (WIDTH * PARTS) + tl.arange(0, WIDTH)
    weights = ()
    by_tap = ()
    for part in tl.static_range(PARTS):
        d = d0 + part * WIDTH
        d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d < D
        for j in tl.static_range(TAPS):
            weights = weights + (tl.load(conv + (j * M + m) * D + d, mask=d_in, other=0.0),)
            by_tap = by_tap + (tl.zeros([TOKENS, WIDTH], tl.float32),)
    share = dots + (tl.program_id(0).to(tl.int64) * M + m) * N * COLUMNS
    column = tl.arange(0, WIDTH)[None, :]
    for start in range(0, RUN, TOKENS):
        n = first + start + tl.arange(0, TOKENS)
        valid, n_wide = n < N, n.to(tl.int64)
        link = tl.load(links + n, mask=valid, other=0) if TAPS > 0 else n
        s = ()
        dot = ()
        for j in tl.static_range(TAPS):
            back = (TAPS - 1 - j) * DILATION
            s = s + (_seen_scale(scales, past_scales, n, n_wide, link, m, back, j, T, past, M),)
            dot = dot + (tl.zeros([TOKENS, WIDTH], tl.float32),)
        gate_dot = tl.zeros([TOKENS, WIDTH], tl.float32)
        sums = ()
        for part in tl.static_range(PARTS):
            d = d0 + part * WIDTH
            d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d < D
            at = ((n_wide * M + m) * D)[:, None] + d[None, :]
            mask = valid[:, None] & d_in[None, :]
            gy = tl.load(grad_out + at, mask=mask, other=0.0).to(tl.float32)
            if TAPS > 0:
                seen = ()
                z = tl.zeros([TOKENS, WIDTH], tl.float32)
                for j in tl.static_range(TAPS):
                    back = (TAPS - 1 - j) * DILATION
                    v = _seen(kv, past_values, n, n_wide, link, d, d_in, back, j, N, T, past, valid, M, D)
                    z += weights[part * TAPS + j][None, :] * (s[j] * v)
                    seen = seen + (v,)
                sig = sigmoid(z)
                gz = gy * (sig + sig * z * (1.0 - sig))
                tl.store(grad_z + at, gz.to(grad_z.dtype.element_ty), mask=mask)
                gate_dot += gy * seen[TAPS - 1]
                more = ()
                for j in tl.static_range(TAPS):
                    gz_v = gz * seen[j]
                    sums = sums + (by_tap[part * TAPS + j] + gz_v * s[j],)
                    more = more + (dot[j] + gz_v * weights[part * TAPS + j][None, :],)
                dot = more
            else:
                v_at = (n_wide * ((M + 1) * D) + M * D)[:, None] + d[None, :]
                gate_dot += gy * tl.load(kv + v_at, mask=mask, other=0.0).to(tl.float32)
        by_tap = sums
        # Put side by side in the first columns of a block: stored one by one they would have to change threads.
        row = tl.where(column == TAPS, tl.sum(gate_dot, 1)[:, None], 0.0)
        for j in tl.static_range(TAPS):
            row = tl.where(column == j, tl.sum(dot[j], 1)[:, None], row)
        tl.store(share + (n_wide * COLUMNS)[:, None] + column, row, mask=valid[:, None] & (column < COLUMNS))
    for part in tl.static_range(PARTS):
        d = d0 + part * WIDTH
        for j in tl.static_range(TAPS):
            into = ((tl.program_id(2).to(tl.int64) * TAPS + j) * M + m) * D + d
            tl.store(tap_sums + into, tl.sum(by_tap[part * TAPS + j], 0), mask=d < D)


@triton.jit(do_not_specialize=_SIZES)
def _coefficients_kernel(
    dots, grad_alpha, documents, alpha, stats, links, coefficients, along_v, N, T, past, eps, root,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, SQUASH: tl.constexpr,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The numbers for each token and branch by which the gradients of h, k and v are sums of rows.

    coefficients [5, M, N]: of h . k, of h and k along themselves, the gate, and the scale (0 at padding).
    """
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    valid = n < N
    size = tl.cast(N, tl.int64) * M
    shown = valid
    if documents is not None:
        now = (n // T).to(tl.int64) * (past + T) + past + n % T
        shown = tl.load(documents + now, mask=valid, other=-1) >= 0
    along = tl.zeros([TOKENS], tl.float32)
    for m in tl.static_range(M):
        gate_v = tl.zeros([TOKENS], tl.float32)
        conv_v = tl.zeros([TOKENS], tl.float32)
        for j in tl.static_range(TAPS):
            ahead = (TAPS - 1 - j) * DILATION
            linked = shown & (((tl.load(links + n + ahead, mask=n + ahead < N, other=0) >> j) & 1) != 0)
            for group in range(GROUPS):
                at = (group * size + m * tl.cast(N, tl.int64) + n + ahead) * COLUMNS + j
                conv_v += tl.load(dots + at, mask=linked, other=0.0)
        for group in range(GROUPS):
            at = (group * size + m * tl.cast(N, tl.int64) + n) * COLUMNS + TAPS
            gate_v += tl.load(dots + at, mask=shown, other=0.0)
        row = n.to(tl.int64) * M + m
        a = tl.load(alpha + row, mask=valid, other=0.0)
        dot = tl.load(stats + row * 4, mask=valid, other=0.0)
        inv_h = tl.load(stats + row * 4 + 1, mask=valid, other=0.0)
        inv_k = tl.load(stats + row * 4 + 2, mask=valid, other=0.0)
        inv_u = tl.load(stats + row * 4 + 3, mask=valid, other=0.0)
        cube = inv_u * inv_u * inv_u
        grad_a = gate_v + conv_v * eps * cube
        if grad_alpha is not None:
            grad_a += tl.load(grad_alpha + row, mask=valid, other=0.0)
        grad_g = grad_a * a * (1.0 - a) * root
        if SQUASH:
            size_g = tl.abs(dot * inv_h * inv_k * root)
            grad_g *= tl.where(size_g >= 1e-6, 0.5 * tl.rsqrt(tl.maximum(size_g, 1e-6)), 0.0)
        gate = tl.where(shown, a, 0.0)
        into = coefficients + m * tl.cast(N, tl.int64) + n
        tl.store(into, grad_g * inv_h * inv_k, mask=valid)
        tl.store(into + size, -grad_g * dot * inv_k * inv_h * inv_h * inv_h / D, mask=valid)
        tl.store(into + 2 * size, -grad_g * dot * inv_h * inv_k * inv_k * inv_k / D, mask=valid)
        tl.store(into + 3 * size, gate, mask=valid)
        tl.store(into + 4 * size, gate * inv_u, mask=valid)
        along -= conv_v * cube * a * a * a / D
    tl.store(along_v + n, along, mask=valid)


@triton.jit(do_not_specialize=_SIZES)
def _gradients_kernel(
    grad_out, hidden, kv, gate, conv, links, grad_z, coefficients, along_v, grad_hidden, grad_kv, gate_sums, N,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, RESIDUAL: tl.constexpr,
    TOKENS: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Gradients of h, k and v, and the sum for the gates' weights, of one block of channels of a run of tokens."""
    which = tl.num_programs(1) - 1 - tl.program_id(1)
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d < D
    size = tl.cast(N, tl.int64) * M
    gates = ()
    weights = ()
    by_gate = ()
    for m in tl.static_range(M):
        gates = gates + (tl.load(gate + m * D + d, mask=d_in, other=0.0),)
        by_gate = by_gate + (tl.zeros([TOKENS, WIDTH], tl.float32),)
        for j in tl.static_range(TAPS):
            weights = weights + (tl.load(conv + (j * M + m) * D + d, mask=d_in, other=0.0),)
    for start in range(0, RUN, TOKENS):
        n = which * RUN + start + tl.arange(0, TOKENS)
        valid, n_wide = n < N, n.to(tl.int64)
        mask = valid[:, None] & d_in[None, :]
        v_at = (n_wide * ((M + 1) * D) + M * D)[:, None] + d[None, :]
        v = tl.load(kv + v_at, mask=mask, other=0.0).to(tl.float32)
        grad_v = tl.load(along_v + n, mask=valid, other=0.0)[:, None] * v
        sees = ()
        for j in tl.static_range(TAPS):
            ahead = (TAPS - 1 - j) * DILATION
            link = tl.load(links + n + ahead, mask=n + ahead < N, other=0)
            sees = sees + (((link >> j) & 1) != 0,)
        sums = ()
        for m in tl.static_range(M):
            at = ((n_wide * M + m) * D)[:, None] + d[None, :]
            k_at = (n_wide * ((M + 1) * D) + m * D)[:, None] + d[None, :]
            gy = tl.load(grad_out + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            h = tl.load(hidden + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            k = tl.load(kv + k_at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            of = coefficients + m * tl.cast(N, tl.int64) + n
            cross = tl.load(of, mask=valid, other=0.0)[:, None]
            along_h = tl.load(of + size, mask=valid, other=0.0)[:, None]
            along_k = tl.load(of + 2 * size, mask=valid, other=0.0)[:, None]
            grad_v += tl.load(of + 3 * size, mask=valid, other=0.0)[:, None] * gy
            if TAPS > 0:
                q = tl.zeros([TOKENS, WIDTH], tl.float32)
                for j in tl.static_range(TAPS):
                    ahead = (TAPS - 1 - j) * DILATION
                    gz = tl.load(grad_z + at + ahead * M * D, mask=sees[j][:, None] & d_in[None, :], other=0.0)
                    q += weights[m * TAPS + j][None, :] * gz.to(tl.float32)
                grad_v += tl.load(of + 4 * size, mask=valid, other=0.0)[:, None] * q
            grad_h = cross * (gates[m][None, :] * k) + along_h * h
            if RESIDUAL:
                grad_h += gy
            tl.store(grad_hidden + at, grad_h.to(grad_hidden.dtype.element_ty), mask=mask)
            grad_k = cross * (gates[m][None, :] * h) + along_k * k
            tl.store(grad_kv + k_at, grad_k.to(grad_kv.dtype.element_ty), mask=mask)
            sums = sums + (by_gate[m] + cross * (h * k),)
        by_gate = sums
        tl.store(grad_kv + v_at, grad_v.to(grad_kv.dtype.element_ty), mask=mask)
    for m in tl.static_range(M):
        into = (which.to(tl.int64) * M + m) * D + d
        tl.store(gate_sums + into, tl.sum(by_gate[m], 0), mask=d_in)


def _weights(
    query_norm: Tensor, key_norm: Tensor, conv_norm: Tensor | None, conv_weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Products of weights in float32: both norms of the gates `[M, D]`, and the taps with their norm `[taps, M, D]`."""
    gate = (widen(query_norm) * widen(key_norm)).contiguous()
    if conv_weight is None or conv_norm is None:
        return gate, None
    return gate, (widen(conv_weight) * widen(conv_norm)).contiguous()


def _left_to_torch(hidden: Tensor, kv: Tensor, conv_weight: Tensor | None) -> bool:
    """Whether no kernel is for this: float64, more taps than links, or tokens that 32 bits don't count."""
    many = conv_weight is not None and len(conv_weight) > _TAPS_LIMIT
    return many or torch.float64 in (hidden.dtype, kv.dtype) or hidden.shape[:2].numel() >= 2**30


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
    if _left_to_torch(hidden, kv, conv_weight):
        return fuse_memory_reference(
            hidden, kv, query_norm, key_norm, conv_norm, conv_weight, documents, past_values, past_scales,
            eps, squash, dilation, residual,
        )  # fmt: skip
    B, T, M, D = hidden.shape
    N, taps = B * T, 0 if conv_weight is None else len(conv_weight)
    past = 0 if past_values is None else past_values.shape[1]
    hidden, kv, documents = hidden.contiguous(), kv.contiguous(), dense(documents)
    past_values, past_scales = (dense(past_values), dense(past_scales)) if past else (None, None)
    out = torch.empty_like(hidden)
    alpha = hidden.new_empty(B, T, M, dtype=torch.float32)
    stats = hidden.new_empty(B, T, M, 4, dtype=torch.float32)
    if not N:
        return out, alpha, stats
    gate, conv = _weights(query_norm, key_norm, conv_norm, conv_weight)
    links, used, scales = _token_buffers(N, M, hidden) if taps else (None, None, None)
    tile = Tile.of(M, D)
    _gate_kernel[(ceil_div(N, tile.tokens),)](
        hidden, kv, gate, documents, out, alpha, stats, links, used, scales, N, T, past, eps, 1 / math.sqrt(D),
        M=M, D=D, TAPS=taps, DILATION=dilation, SQUASH=squash, RESIDUAL=residual,
        TOKENS=tile.tokens, BRANCHES=tile.branches, WIDTH=tile.width, EVEN=tile.even, num_warps=8,
    )  # fmt: skip
    if taps:
        strip = Strip.of(N, D, hidden.device)
        _output_kernel[(strip.blocks, strip.runs)](
            hidden, kv, conv, past_values, past_scales, links, used, scales, out, N, T, past,
            M=M, D=D, TAPS=taps, DILATION=dilation, RESIDUAL=residual,
            TOKENS=strip.tokens, WIDTH=strip.width, EVEN=strip.even, RUN=strip.run, num_warps=4,
        )  # fmt: skip
    return out, alpha, stats


def _token_buffers(N: int, M: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Links `[N]`, gates and scales `[N, M]`, to be filled."""
    links = torch.empty(N, dtype=torch.int32, device=like.device)
    used, scales = torch.empty(2, N, M, dtype=torch.float32, device=like.device)
    return links, used, scales


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
    if _left_to_torch(hidden, kv, conv_weight):
        return fuse_memory_backward_reference(
            grad_out, grad_alpha, hidden, kv, query_norm, key_norm, conv_norm, conv_weight, documents, past_values,
            past_scales, alpha, stats, eps, squash, dilation, residual,
        )  # fmt: skip
    B, T, M, D = hidden.shape
    N, taps = B * T, 0 if conv_weight is None else len(conv_weight)
    past = 0 if past_values is None else past_values.shape[1]
    grad_out, hidden, kv, documents = grad_out.contiguous(), hidden.contiguous(), kv.contiguous(), dense(documents)
    past_values, past_scales = (dense(past_values), dense(past_scales)) if past else (None, None)
    alpha, stats, grad_alpha = alpha.contiguous(), stats.contiguous(), dense(grad_alpha)
    gate, conv = _weights(query_norm, key_norm, conv_norm, conv_weight)
    wide = functools.partial(torch.empty, dtype=torch.float32, device=hidden.device)
    grad_hidden, grad_kv = torch.empty_like(hidden), torch.empty_like(kv)
    strip = Strip.of(N, D, hidden.device)
    gate_sums = wide(strip.runs, M, D)
    # One branch each, and blocks in pairs: half as many sums over the 32 channels of a warp, which are its costly part.
    pairs = Strip.of(N, D, hidden.device, parts=2, beside=M)
    tap_sums = wide(pairs.runs, taps, M, D) if taps else None
    if N:
        links = used = scales = grad_z = None
        if taps:
            links, used, scales = _token_buffers(N, M, hidden)
            grad_z = torch.empty_like(hidden)
            _prepare_kernel[(ceil_div(N, 64),)](
                documents, alpha, stats, links, used, scales, N, T, past,
                M=M, TAPS=taps, DILATION=dilation, TOKENS=64, BRANCHES=triton.next_power_of_2(M), num_warps=4,
            )  # fmt: skip
        columns = max(triton.next_power_of_2(taps + 1), 4)
        dots = wide(pairs.blocks, M, N, columns)
        coefficients, along_v = wide(5, M, N), wide(N)
        settings = {"M": M, "D": D, "TAPS": taps, "DILATION": dilation}
        _sums_kernel[(pairs.blocks, M, pairs.runs)](
            grad_out, kv, conv, past_values, past_scales, links, scales, grad_z, dots, tap_sums, N, T, past, **settings,
            TOKENS=pairs.tokens, WIDTH=pairs.width, EVEN=pairs.even, PARTS=pairs.parts, RUN=pairs.run,
            COLUMNS=columns, num_warps=4,
        )  # fmt: skip
        _coefficients_kernel[(ceil_div(N, 128),)](
            dots, grad_alpha, documents, alpha, stats, links, coefficients, along_v, N, T, past, eps, 1 / math.sqrt(D),
            **settings, SQUASH=squash, GROUPS=pairs.blocks, COLUMNS=columns, TOKENS=128, num_warps=4,
        )  # fmt: skip
        _gradients_kernel[(strip.blocks, strip.runs)](
            grad_out, hidden, kv, gate, conv, links, grad_z, coefficients, along_v, grad_hidden, grad_kv, gate_sums, N,
            **settings, RESIDUAL=residual,
            TOKENS=strip.tokens, WIDTH=strip.width, EVEN=strip.even, RUN=strip.run, num_warps=4,
        )  # fmt: skip
    grad_both = gate_sums.sum(0)
    grad_norm = grad_weight = query_norm.new_empty(0)
    if conv_weight is not None and conv_norm is not None and tap_sums is not None:
        per_tap = tap_sums.sum(0)
        grad_norm = (per_tap * widen(conv_weight)).sum(0).to(conv_norm.dtype)
        grad_weight = (per_tap * widen(conv_norm)).to(conv_weight.dtype)
    return (
        grad_hidden,
        grad_kv,
        (grad_both * widen(key_norm)).to(query_norm.dtype),
        (grad_both * widen(query_norm)).to(key_norm.dtype),
        grad_norm,
        grad_weight,
    )
