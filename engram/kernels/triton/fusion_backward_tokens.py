"""The backward of `fuse_memory` without a convolution (reference: engram/kernels/fusion.py).

A token's gradients need sums over D of its own rows. So a program takes one token after another: it reads gy and v for
the sums, and h and k so that they are there when the sums are; then it looks at gy again, in the cache. While it waits,
the next token's gy and v come nearer. Sums for the norms' gradients stay in registers over a run of tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.device import prefetch_bulk, sum_each
from engram.kernels.triton.fusion_taps import SIZES, document_of
from engram.kernels.triton.launch import WARP, Row, at_most, in_bulk


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
def give_part(
    gys, hs, ks, grad_v, used, cross, along_h, along_k, sums, norms, grad_hidden, grad_kv, row, k_row,
    d, d_in, part: tl.constexpr, M: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr,
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
        tl.store(grad_hidden + at, grad_h.to(grad_hidden.dtype.element_ty), mask=d_in)
        grad_k = both * h + along_k[m] * k
        at = (k_row + m) * D + d
        tl.store(grad_kv + at, grad_k.to(grad_kv.dtype.element_ty), mask=d_in)
        grad_v += used[m] * gy
        more = more + (sums[part * M + m] + cross[m] * (h * k),)
    at = (k_row + M) * D + d
    tl.store(grad_kv + at, grad_v.to(grad_kv.dtype.element_ty), mask=d_in)
    return more


@triton.jit
def products_of_norms(query_norm, key_norm, d, d_in, M: tl.constexpr, D: tl.constexpr):
    """Products of the gates' norms."""
    norms = ()
    for m in tl.static_range(M):
        query = tl.load(query_norm + m * D + d, mask=d_in, other=0.0, eviction_policy="evict_last")
        key = tl.load(key_norm + m * D + d, mask=d_in, other=0.0, eviction_policy="evict_last")
        norms = norms + (query.to(tl.float32) * key.to(tl.float32),)
    return norms


@triton.jit
def load_rows(at, D: tl.constexpr, M: tl.constexpr, d_in, POLICY: tl.constexpr):
    """A row for each branch."""
    rows = ()
    for m in tl.static_range(M):
        rows = rows + (tl.load(at + m * D, mask=d_in, other=0.0, eviction_policy=POLICY),)
    return rows


@triton.jit
def load_each(at, STEP: tl.constexpr, M: tl.constexpr):
    """A number for each branch."""
    numbers = ()
    for m in tl.static_range(M):
        numbers = numbers + (tl.load(at + m * STEP),)
    return numbers


@triton.jit(do_not_specialize=[*SIZES, "run"])
def _token_kernel(
    grad_out, grad_alpha, hidden, kv, query_norm, key_norm, documents, alpha, stats, grad_hidden, grad_kv,
    gate_sums, N, T, past, run, root,
    M: tl.constexpr, D: tl.constexpr, SQUASH: tl.constexpr, RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, EARLY: tl.constexpr, BULK: tl.constexpr, THREADS: tl.constexpr,
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
        shown = document_of(documents, n, True, T, past) >= 0  # small things first: they take as long to come
        gates = load_each(alpha + row, 1, M)
        dots = load_each(stats + 4 * row, 4, M)
        inv_h = load_each(stats + 4 * row + 1, 4, M)
        inv_k = load_each(stats + 4 * row + 2, 4, M)
        if grad_alpha is not None:
            given = load_each(grad_alpha + row, 1, M)
        gate_v = ()
        for _ in tl.static_range(M):
            gate_v = gate_v + (tl.zeros([WIDTH], tl.float32),)
        hs = ()
        ks = ()
        for part in tl.static_range(PARTS):
            d = part * WIDTH + tl.arange(0, WIDTH)
            d_in = tl.full([WIDTH], True, tl.int1) if D % WIDTH == 0 else d < D
            v = tl.load(kv + (k_row + M) * D + d, mask=d_in, other=0.0).to(tl.float32)
            gys = load_rows(grad_out + row * D + d, D, M, d_in, "")
            if EARLY:  # asked for before the sums are waited for
                hs = hs + load_rows(hidden + row * D + d, D, M, d_in, "evict_first")
                ks = ks + load_rows(kv + k_row * D + d, D, M, d_in, "evict_first")
            more = ()
            for m in tl.static_range(M):
                more = more + (gate_v[m] + gys[m].to(tl.float32) * v,)
            gate_v = more
        if BULK:
            prefetch_bulk(grad_out + (row + M) * D, M * D, n + 1 < end, THREADS)
            prefetch_bulk(kv + (k_row + 2 * M + 1) * D, D, n + 1 < end, THREADS)
        grad_gates = sum_each(gate_v, M)
        used = ()
        cross = ()
        along_h = ()
        along_k = ()
        for m in tl.static_range(M):
            grad_a = tl.where(shown, grad_gates[m], 0.0)
            if grad_alpha is not None:
                grad_a += given[m]
            slopes = gate_slopes(grad_a, gates[m], dots[m], inv_h[m], inv_k[m], root, D, SQUASH)
            used = used + (tl.where(shown, gates[m], 0.0),)
            cross = cross + (slopes[0],)
            along_h = along_h + (slopes[1],)
            along_k = along_k + (slopes[2],)
        more = ()
        for part in tl.static_range(PARTS):
            d = part * WIDTH + tl.arange(0, WIDTH)
            d_in = tl.full([WIDTH], True, tl.int1) if D % WIDTH == 0 else d < D
            gys = load_rows(grad_out + row * D + d, D, M, d_in, "evict_first")
            if EARLY:
                h = hs[part * M : (part + 1) * M]
                k = ks[part * M : (part + 1) * M]
            else:  # all asked for before the first is waited for
                h = load_rows(hidden + row * D + d, D, M, d_in, "evict_first")
                k = load_rows(kv + k_row * D + d, D, M, d_in, "evict_first")
            norms = products_of_norms(query_norm, key_norm, d, d_in, M, D)
            more = more + give_part(
                gys, h, k, tl.zeros([WIDTH], tl.float32), used, cross, along_h, along_k, sums, norms,
                grad_hidden, grad_kv, row, k_row, d, d_in, part, M, D, RESIDUAL,
            )  # fmt: skip
        sums = more
        n += 1
    for part in tl.static_range(PARTS):
        d = part * WIDTH + tl.arange(0, WIDTH)
        for m in tl.static_range(M):
            into = gate_sums + (tl.program_id(0).to(tl.int64) * M + m) * D + d
            tl.store(into, sums[part * M + m], mask=d < D)


def token_gradients(
    grad_kv: Tensor,
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
    squash: bool,
    residual: bool,
) -> tuple[Tensor, Tensor]:
    """Fills `grad_kv`; returns the gradients of hidden, and those of the products of the gates' norms in parts to be
    summed, `[parts, M, D]`."""
    B, T, M, D = hidden.shape
    N = B * T
    row = Row.of(N, D, hidden.device)
    grad_hidden = torch.empty_like(hidden)
    gate_sums = hidden.new_empty(row.programs, M, D, dtype=torch.float32)
    # A thread has registers for h and k of 16 blocks in bfloat16 beside its sums.
    early = row.parts * M * (hidden.element_size() + kv.element_size()) <= 64
    _token_kernel[(row.programs,)](
        grad_out, grad_alpha, hidden, kv, query_norm, key_norm, documents, alpha, stats, grad_hidden, grad_kv,
        gate_sums, N, T, past, row.run, 1 / math.sqrt(D),
        M=M, D=D, SQUASH=squash, RESIDUAL=residual, WIDTH=row.width, PARTS=row.parts, EARLY=early,
        BULK=in_bulk(grad_out, kv.view(B, T, M + 1, D)), THREADS=8 * WARP, num_warps=8, **at_most(255),
    )  # fmt: skip
    return grad_hidden, gate_sums
