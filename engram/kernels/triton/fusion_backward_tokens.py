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
from engram.kernels.triton.launch import Row, at_most


@triton.jit
def gate_slopes(grad_a, a, dot, inv_h, inv_k, root, D: tl.constexpr, SQUASH: tl.constexpr):
    """By how much h and k, crossed and each along itself, enter each other's gradients, given those of the gates."""
    grad_g = grad_a * a * (1.0 - a) * root
    if SQUASH:
        size = tl.abs(dot * inv_h * inv_k * root)
        grad_g *= tl.where(size >= 1e-6, 0.5 * tl.rsqrt(tl.maximum(size, 1e-6)), 0.0)
    cross = grad_g * inv_h * inv_k
    return cross, -cross * dot * inv_h * inv_h / D, -cross * dot * inv_k * inv_k / D


@triton.jit(do_not_specialize=[*SIZES, "run"])
def _token_kernel(
    grad_out, grad_alpha, hidden, kv, query_norm, key_norm, documents, alpha, stats, dots, grad_hidden, grad_kv,
    gate_sums, N, T, past, run, eps, root,
    M: tl.constexpr, D: tl.constexpr, SQUASH: tl.constexpr, RESIDUAL: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of h, k and v, and the sums for the norms' gradients, of a run of tokens, one after another.

    With dots [N, M, blocks], what taps hand back to values lies in grad_kv, in their place.
    """
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
        for part in tl.static_range(PARTS):
            d = part * WIDTH + tl.arange(0, WIDTH)
            d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d < D
            v = tl.load(kv + (k_row + M) * D + d, mask=d_in, other=0.0).to(tl.float32)
            more = ()
            for m in tl.static_range(M):
                gy = tl.load(grad_out + (row + m) * D + d, mask=d_in, other=0.0).to(tl.float32)
                more = more + (gate_v[m] + gy * v,)
            gate_v = more
        shown = document_of(documents, n, True, T, past) >= 0
        used = ()
        cross = ()
        along_h = ()
        along_k = ()
        along_v = 0.0
        for m in tl.static_range(M):
            a = tl.load(alpha + row + m)
            stat = stats + (row + m) * 4
            grad_a = tl.where(shown, tl.sum(gate_v[m], 0), 0.0)
            if dots is not None:
                b = tl.arange(0, COLUMNS)
                handed = tl.load(dots + (row + m) * BLOCKS + b, mask=shown & (b < BLOCKS), other=0.0)
                grad_s = tl.sum(handed, 0)
                inv_u = tl.load(stat + 3)
                # s = alpha inv_u, with inv_u = (alpha^2 mean(v^2) + eps)^(-1/2).
                grad_a += grad_s * eps * inv_u * inv_u * inv_u
                along_v -= grad_s * (inv_u * a) * (inv_u * a) * (inv_u * a) / D
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
            gys = ()
            hs = ()
            ks = ()
            for m in tl.static_range(M):  # all asked for before the first is waited for
                at = (row + m) * D + d
                k_at = (k_row + m) * D + d
                gys = gys + (tl.load(grad_out + at, mask=d_in, other=0.0, eviction_policy="evict_first"),)
                hs = hs + (tl.load(hidden + at, mask=d_in, other=0.0, eviction_policy="evict_first"),)
                ks = ks + (tl.load(kv + k_at, mask=d_in, other=0.0, eviction_policy="evict_first"),)
            v_at = (k_row + M) * D + d
            grad_v = tl.zeros([WIDTH], tl.float32)
            if dots is not None:
                v = tl.load(kv + v_at, mask=d_in, other=0.0, eviction_policy="evict_first")
                grad_v = along_v * v.to(tl.float32) + tl.load(grad_kv + v_at, mask=d_in, other=0.0).to(tl.float32)
            for m in tl.static_range(M):
                gy, h, k = gys[m].to(tl.float32), hs[m].to(tl.float32), ks[m].to(tl.float32)
                query = tl.load(query_norm + m * D + d, mask=d_in, other=0.0, eviction_policy="evict_last")
                key = tl.load(key_norm + m * D + d, mask=d_in, other=0.0, eviction_policy="evict_last")
                both = cross[m] * (query.to(tl.float32) * key.to(tl.float32))
                grad_h = both * k + along_h[m] * h
                if RESIDUAL:
                    grad_h += gy
                tl.store(grad_hidden + (row + m) * D + d, grad_h.to(grad_hidden.dtype.element_ty), mask=d_in)
                grad_k = both * h + along_k[m] * k
                tl.store(grad_kv + (k_row + m) * D + d, grad_k.to(grad_kv.dtype.element_ty), mask=d_in)
                grad_v += used[m] * gy
                more = more + (sums[part * M + m] + cross[m] * (h * k),)
            tl.store(grad_kv + v_at, grad_v.to(grad_kv.dtype.element_ty), mask=d_in)
        sums = more
        n += 1
    for part in tl.static_range(PARTS):
        d = part * WIDTH + tl.arange(0, WIDTH)
        for m in tl.static_range(M):
            into = gate_sums + (tl.program_id(0).to(tl.int64) * M + m) * D + d
            tl.store(into, sums[part * M + m], mask=d < D)


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
    row = Row.of(B * T, D, hidden.device)
    blocks = 1 if dots is None else dots.shape[-1]
    grad_hidden = torch.empty_like(hidden)
    gate_sums = hidden.new_empty(row.programs, M, D, dtype=torch.float32)
    _token_kernel[(row.programs,)](
        grad_out, grad_alpha, hidden, kv, query_norm, key_norm, documents, alpha, stats, dots, grad_hidden, grad_kv,
        gate_sums, B * T, T, past, row.run, eps, 1 / math.sqrt(D),
        M=M, D=D, SQUASH=squash, RESIDUAL=residual, WIDTH=row.width, PARTS=row.parts, EVEN=D % row.width == 0,
        BLOCKS=blocks, COLUMNS=triton.next_power_of_2(blocks), num_warps=row.warps, **at_most(128),
    )  # fmt: skip
    return grad_hidden, gate_sums
