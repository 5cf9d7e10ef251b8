"""The backward of `fuse_memory`, token by token (reference: engram/kernels/fusion.py).

A token's gradients need sums over D of its own rows, and what taps hand back to it. So a program takes one token after
another: it reads gy and v for the sums, then both again, from the cache, with h and k. Sums for the norms' gradients
stay in registers over a run of tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.fusion_taps import SIZES, document_of
from engram.kernels.triton.launch import Row, at_most, ceil_div, machine, prefetch


@triton.jit
def gate_slopes(grad_a, a, dot, inv_h, inv_k, root, D: tl.constexpr, SQUASH: tl.constexpr):
    """By how much h and k, crossed and each along itself, enter each other's gradients, given those of the gates."""
    grad_g = grad_a * a * (1.0 - a) * root
    if SQUASH:
        size = tl.abs(dot * inv_h * inv_k * root)
        grad_g *= tl.where(size >= 1e-6, 0.5 * tl.rsqrt(tl.maximum(size, 1e-6)), 0.0)
    cross = grad_g * inv_h * inv_k
    return cross, -cross * dot * inv_h * inv_h / D, -cross * dot * inv_k * inv_k / D


@triton.jit
def _give_part(
    gys, hs, ks, grad_v, used, cross, along_h, along_k, sums, norms, grad_hidden, grad_kv, row, k_row,
    d, d_in, part: tl.constexpr, M: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Gradients of a token's h, k and v in some channels; the sums for the norms' gradients with the token's part."""
    more = ()
    for m in tl.static_range(M):
        gy, h, k = gys[m].to(tl.float32), hs[m].to(tl.float32), ks[m].to(tl.float32)
        both = cross[m] * norms[m]
        grad_h = both * k + along_h[m] * h
        if RESIDUAL:
            grad_h += gy
        at = (row + m) * D + d
        tl.store(grad_hidden + at, grad_h.to(grad_hidden.dtype.element_ty), mask=d_in, cache_modifier=OUT)
        grad_k = both * h + along_k[m] * k
        at = (k_row + m) * D + d
        tl.store(grad_kv + at, grad_k.to(grad_kv.dtype.element_ty), mask=d_in, cache_modifier=OUT)
        grad_v += used[m] * gy
        more = more + (sums[part * M + m] + cross[m] * (h * k),)
    at = (k_row + M) * D + d
    tl.store(grad_kv + at, grad_v.to(grad_kv.dtype.element_ty), mask=d_in, cache_modifier=OUT)
    return more


@triton.jit
def _norms(query_norm, key_norm, d, d_in, M: tl.constexpr, D: tl.constexpr):
    """Products of the gates' norms."""
    norms = ()
    for m in tl.static_range(M):
        query = tl.load(query_norm + m * D + d, mask=d_in, other=0.0, eviction_policy="evict_last")
        key = tl.load(key_norm + m * D + d, mask=d_in, other=0.0, eviction_policy="evict_last")
        norms = norms + (query.to(tl.float32) * key.to(tl.float32),)
    return norms


@triton.jit
def _load_rows(at, D: tl.constexpr, M: tl.constexpr, d_in, POLICY: tl.constexpr, CACHE: tl.constexpr):
    rows = ()
    for m in tl.static_range(M):
        rows = rows + (tl.load(at + m * D, mask=d_in, other=0.0, eviction_policy=POLICY, cache_modifier=CACHE),)
    return rows


@triton.jit(do_not_specialize=[*SIZES, "run"])
def _token_kernel(
    grad_out, grad_alpha, hidden, kv, query_norm, key_norm, documents, alpha, stats, grad_hidden, grad_kv,
    gate_sums, N, T, past, run, root,
    M: tl.constexpr, D: tl.constexpr, SQUASH: tl.constexpr, RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr, SECTOR: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Gradients of h, k and v, and the sums for the norms' gradients, of a run of tokens, one after another."""
    sums = ()
    for _ in tl.static_range(PARTS * M):
        sums = sums + (tl.zeros([WIDTH], tl.float32),)
    n = tl.program_id(0) * run
    end = tl.minimum(n + run, N)
    while n < end:  # the interpreter takes no such numbers for a range
        row = tl.cast(n, tl.int64) * M
        k_row = tl.cast(n, tl.int64) * (M + 1)
        gate_v = ()
        for _ in tl.static_range(M):
            gate_v = gate_v + (tl.zeros([WIDTH], tl.float32),)
        if AHEAD:
            then = tl.cast(tl.minimum(n + AHEAD, N - 1), tl.int64)
            prefetch(grad_out + then * (M * D), 1, D, M * D, SECTOR)
            prefetch(hidden + then * (M * D), 1, D, M * D, SECTOR)
            prefetch(kv + then * ((M + 1) * D), 1, D, (M + 1) * D, SECTOR)
        hs = ()
        ks = ()
        for part in tl.static_range(PARTS):
            d = part * WIDTH + tl.arange(0, WIDTH)
            d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d < D
            v = tl.load(kv + (k_row + M) * D + d, mask=d_in, other=0.0).to(tl.float32)
            gys = _load_rows(grad_out + row * D + d, D, M, d_in, "", "")
            if part < EARLY:
                hs = hs + _load_rows(hidden + row * D + d, D, M, d_in, "evict_first", "")
                ks = ks + _load_rows(kv + k_row * D + d, D, M, d_in, "evict_first", "")
            more = ()
            for m in tl.static_range(M):
                more = more + (gate_v[m] + gys[m].to(tl.float32) * v,)
            gate_v = more
        shown = document_of(documents, n, True, T, past) >= 0
        used = ()
        cross = ()
        along_h = ()
        along_k = ()
        for m in tl.static_range(M):
            a = tl.load(alpha + row + m)
            stat = stats + (row + m) * 4
            grad_a = tl.where(shown, tl.sum(gate_v[m], 0), 0.0)
            if grad_alpha is not None:
                grad_a += tl.load(grad_alpha + row + m)
            slopes = gate_slopes(grad_a, a, tl.load(stat), tl.load(stat + 1), tl.load(stat + 2), root, D, SQUASH)
            used = used + (tl.where(shown, a, 0.0),)
            cross = cross + (slopes[0],)
            along_h = along_h + (slopes[1],)
            along_k = along_k + (slopes[2],)
        more = ()
        for part in tl.static_range(PARTS):
            d = part * WIDTH + tl.arange(0, WIDTH)
            d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d < D
            gys = _load_rows(grad_out + row * D + d, D, M, d_in, "evict_first", "")
            if part < EARLY:
                h = hs[part * M : (part + 1) * M]
                k = ks[part * M : (part + 1) * M]
            else:  # all asked for before the first is waited for
                h = _load_rows(hidden + row * D + d, D, M, d_in, "evict_first", "")
                k = _load_rows(kv + k_row * D + d, D, M, d_in, "evict_first", "")
            norms = _norms(query_norm, key_norm, d, d_in, M, D)
            more = more + _give_part(
                gys, h, k, tl.zeros([WIDTH], tl.float32), used, cross, along_h, along_k, sums, norms,
                grad_hidden, grad_kv, row, k_row, d, d_in, part, M, D, RESIDUAL, OUT,
            )  # fmt: skip
        sums = more
        n += 1
    for part in tl.static_range(PARTS):
        d = part * WIDTH + tl.arange(0, WIDTH)
        for m in tl.static_range(M):
            into = gate_sums + (tl.program_id(0).to(tl.int64) * M + m) * D + d
            tl.store(into, sums[part * M + m], mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def _slopes_kernel(
    dots, grad_alpha, documents, alpha, stats, factors, along_v, N, T, past, root,
    M: tl.constexpr, D: tl.constexpr, SQUASH: tl.constexpr, BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr, BRANCHES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A token's gate, 0 at padding, and slopes for each branch into factors [N, M, 4]; along_v [N] is summed."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m = tl.arange(0, BRANCHES)
    b = tl.arange(0, COLUMNS)
    valid = n < N
    wide_n = n.to(tl.int64)
    row = wide_n[:, None] * M + m[None, :]
    both = valid[:, None] & (m < M)[None, :]
    shown = (document_of(documents, n, valid, T, past) >= 0)[:, None]
    at = (row + wide_n[:, None])[:, :, None] * BLOCKS + b[None, None, :]
    grad_a = tl.sum(tl.load(dots + at, mask=(both & shown)[:, :, None] & (b < BLOCKS)[None, None, :], other=0.0), 2)
    if grad_alpha is not None:
        grad_a += tl.load(grad_alpha + row, mask=both, other=0.0)
    a = tl.load(alpha + row, mask=both, other=0.0)
    stat = stats + row * 4
    dot = tl.load(stat, mask=both, other=0.0)
    inv_h, inv_k = tl.load(stat + 1, mask=both, other=0.0), tl.load(stat + 2, mask=both, other=0.0)
    cross, along_h, along_k = gate_slopes(grad_a, a, dot, inv_h, inv_k, root, D, SQUASH)
    tl.store(factors + row * 4, tl.where(shown, a, 0.0), mask=both)
    tl.store(factors + row * 4 + 1, cross, mask=both)
    tl.store(factors + row * 4 + 2, along_h, mask=both)
    tl.store(factors + row * 4 + 3, along_k, mask=both)
    at = (wide_n * (M + 1) + M)[:, None] * BLOCKS + b[None, :]
    tl.store(along_v + n, tl.sum(tl.load(dots + at, mask=valid[:, None] & (b < BLOCKS)[None, :], other=0.0), 1), mask=valid)


@triton.jit(do_not_specialize=["N", "run"])
def _give_kernel(
    grad_out, hidden, kv, query_norm, key_norm, factors, along_v, grad_hidden, grad_kv, gate_sums, N, run,
    M: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, EVEN: tl.constexpr,
    OUT: tl.constexpr,
):  # fmt: skip
    """Gradients of h, k and v, and the sums for the norms' gradients, in a block of channels of a run of tokens.

    What taps hand back to values lies in grad_kv, in their place.
    """
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([WIDTH], tl.float32),)
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d < D
    norms = _norms(query_norm, key_norm, d, d_in, M, D)
    first = tl.program_id(1) * run
    n = tl.minimum(first + run, N) - 1
    while n >= first:  # from the end, which the taps' programs read last
        row = tl.cast(n, tl.int64) * M
        k_row = tl.cast(n, tl.int64) * (M + 1)
        gys = _load_rows(grad_out + row * D + d, D, M, d_in, "evict_first", "")
        hs = _load_rows(hidden + row * D + d, D, M, d_in, "evict_first", "")
        ks = _load_rows(kv + k_row * D + d, D, M, d_in, "evict_first", "")
        v_at = (k_row + M) * D + d
        v = tl.load(kv + v_at, mask=d_in, other=0.0, eviction_policy="evict_first")
        r = tl.load(grad_kv + v_at, mask=d_in, other=0.0, eviction_policy="evict_first")
        used = ()
        cross = ()
        along_h = ()
        along_k = ()
        for m in tl.static_range(M):
            at = factors + (row + m) * 4
            used = used + (tl.load(at),)
            cross = cross + (tl.load(at + 1),)
            along_h = along_h + (tl.load(at + 2),)
            along_k = along_k + (tl.load(at + 3),)
        grad_v = tl.load(along_v + n) * v.to(tl.float32) + r.to(tl.float32)
        sums = _give_part(
            gys, hs, ks, grad_v, used, cross, along_h, along_k, sums, norms,
            grad_hidden, grad_kv, row, k_row, d, d_in, 0, M, D, RESIDUAL, OUT,
        )  # fmt: skip
        n -= 1
    for m in tl.static_range(M):
        into = gate_sums + (tl.program_id(1).to(tl.int64) * M + m) * D + d
        tl.store(into, sums[m], mask=d_in)


ROW, ROW_REG, EARLY, AHEAD, SECTOR, ROW_OUT = None, 128, 0, 0, 128, ""
GIVE_WARPS, GIVE_EACH, GIVE_REG, GIVE_PER, GIVE_OUT = 1, 4, 128, 16, ""


def token_gradients(
    grad_kv: Tensor,
    dots: Tensor | None,
    grad_out: Tensor,
    grad_alpha: Tensor | None,
    hidden: Tensor,
    kv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    documents: Tensor | None,
    past: int,
    alpha: Tensor,
    stats: Tensor,
    eps: float,
    squash: bool,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """Fills `grad_kv`; returns the gradients of hidden, and those of the products of the gates' norms in parts to be
    summed, `[parts, M, D]`. `dots`, and what `grad_kv` then holds already, are from `hand_back`."""
    B, T, M, D = hidden.shape
    N = B * T
    grad_hidden = torch.empty_like(hidden)
    root = 1 / math.sqrt(D)
    if dots is not None:
        blocks = dots.shape[-1]
        factors, along_v = (torch.empty(N, x, dtype=torch.float32, device=kv.device) for x in (4 * M, 1))
        columns, branches = triton.next_power_of_2(blocks), triton.next_power_of_2(M)
        tokens = max(1, 4096 // (columns * branches))
        _slopes_kernel[(ceil_div(N, tokens),)](
            dots, grad_alpha, documents, alpha, stats, factors, along_v, N, T, past, root,
            M=M, D=D, SQUASH=squash, BLOCKS=blocks, TOKENS=tokens, BRANCHES=branches, COLUMNS=columns, num_warps=4,
        )  # fmt: skip
        width = min(GIVE_WARPS * 32 * GIVE_EACH, max(triton.next_power_of_2(D), 16))
        parts = ceil_div(D, width)
        runs = max(GIVE_PER // GIVE_WARPS * machine(kv.device).processors // parts, 1)
        run = ceil_div(N, runs)
        runs = ceil_div(N, run)
        gate_sums = hidden.new_empty(runs, M, D, dtype=torch.float32)
        _give_kernel[(parts, runs)](
            grad_out, hidden, kv, query_norm, key_norm, factors, along_v, grad_hidden, grad_kv, gate_sums, N, run,
            M=M, D=D, RESIDUAL=residual, WIDTH=width, EVEN=D % width == 0, OUT=GIVE_OUT, num_warps=GIVE_WARPS,
            **at_most(GIVE_REG),
        )  # fmt: skip
        return grad_hidden, gate_sums
    row = Row.of(N, D, hidden.device)
    if ROW is not None:
        warps, width, programs = ROW
        width = min(width, max(triton.next_power_of_2(D), 16))
        run = ceil_div(N, machine(kv.device).processors * programs)
        row = Row(width, ceil_div(D, width), warps, run, ceil_div(N, run))
    gate_sums = hidden.new_empty(row.programs, M, D, dtype=torch.float32)
    _token_kernel[(row.programs,)](
        grad_out, grad_alpha, hidden, kv, query_norm, key_norm, documents, alpha, stats, grad_hidden, grad_kv,
        gate_sums, N, T, past, row.run, root,
        M=M, D=D, SQUASH=squash, RESIDUAL=residual, WIDTH=row.width, PARTS=row.parts, EVEN=D % row.width == 0,
        EARLY=EARLY, AHEAD=AHEAD, SECTOR=SECTOR, OUT=ROW_OUT, num_warps=row.warps, **at_most(ROW_REG),
    )  # fmt: skip
    return grad_hidden, gate_sums
