"""The backward of `fuse_memory` with a convolution, after its taps (reference: engram/kernels/fusion.py).

All sums over D are there then, in parts: of them first come a few factors for each token and branch. What is left needs
of each channel only itself, so that a warp takes a block of channels, and sums for the norms' gradients stay in
registers over a run of tokens. What others have stored in the same launch is read past the L1 cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import triton
import triton.language as tl

from engram.kernels.triton.fusion_backward_tokens import gate_slopes, give_part, load_rows, products_of_norms
from engram.kernels.triton.fusion_taps import document_of


@triton.jit
def store_factors(
    dots, grad_alpha, documents, alpha, stats, factors, along_v, start, end, tail, slot, N, T, past, root,
    M: tl.constexpr, D: tl.constexpr, SQUASH: tl.constexpr, BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr, BRANCHES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A token's gate, 0 at padding, and slopes for each branch: factors [N, M, 4]; how much v enters grad_v: [N].

    Of the TOKENS from `start` on, before `end`; of those from `tail` on further parts of the sums lie from `slot` on.
    """
    n = start + tl.arange(0, TOKENS)
    m = tl.arange(0, BRANCHES)
    b = tl.arange(0, COLUMNS)
    valid = n < end
    wide_n = n.to(tl.int64)
    row = wide_n[:, None] * M + m[None, :]
    both = valid[:, None] & (m < M)[None, :]
    shown = (document_of(documents, n, valid, T, past) >= 0)[:, None]
    first = wide_n * ((M + 1) * BLOCKS)
    more = (wide_n - tail + slot) * ((M + 1) * BLOCKS)
    late = valid & (n >= tail)
    known = (m < M)[None, :, None] & (b < BLOCKS)[None, None, :]
    at = m[None, :, None] * BLOCKS + b[None, None, :]
    sums = tl.load(dots + first[:, None, None] + at, mask=valid[:, None, None] & known, other=0.0, cache_modifier=".cg")
    sums += tl.load(dots + more[:, None, None] + at, mask=late[:, None, None] & known, other=0.0, cache_modifier=".cg")
    grad_a = tl.where(shown, tl.sum(sums, 2), 0.0)
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
    known = (b < BLOCKS)[None, :]
    at = M * BLOCKS + b[None, :]
    sums = tl.load(dots + first[:, None] + at, mask=valid[:, None] & known, other=0.0, cache_modifier=".cg")
    sums += tl.load(dots + more[:, None] + at, mask=late[:, None] & known, other=0.0, cache_modifier=".cg")
    tl.store(along_v + n, tl.sum(sums, 1), mask=valid)


@triton.jit
def give(
    grad_out, hidden, kv, query_norm, key_norm, factors, along_v, grad_hidden, grad_kv, tails, first, end, tail, slot,
    block, M: tl.constexpr, D: tl.constexpr, REACH: tl.constexpr, RESIDUAL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of h, k and v in a block of channels of a run of tokens; returns the sums for the norms' gradients.

    What taps hand back to values lies in grad_kv, in their place; more of it, of tokens from `tail` on, in tails from
    row `slot` on.
    """
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([WIDTH], tl.float32),)
    d = block * WIDTH + tl.arange(0, WIDTH)
    d_in = tl.full([WIDTH], True, tl.int1) if D % WIDTH == 0 else d < D
    norms = products_of_norms(query_norm, key_norm, d, d_in, M, D)
    n = first
    while n < end:
        row = tl.cast(n, tl.int64) * M
        k_row = tl.cast(n, tl.int64) * (M + 1)
        gys = load_rows(grad_out + row * D + d, D, M, d_in, "evict_first")
        hs = load_rows(hidden + row * D + d, D, M, d_in, "evict_first")
        ks = load_rows(kv + k_row * D + d, D, M, d_in, "evict_first")
        v_at = (k_row + M) * D + d
        v = tl.load(kv + v_at, mask=d_in, other=0.0, eviction_policy="evict_first")
        r = tl.load(grad_kv + v_at, mask=d_in, other=0.0, cache_modifier=".cg").to(tl.float32)
        if REACH > 0:
            at = tl.cast(n - tail + slot, tl.int64) * D + d
            r += tl.load(tails + at, mask=(n >= tail) & d_in, other=0.0, cache_modifier=".cg").to(tl.float32)
        used = ()
        cross = ()
        along_h = ()
        along_k = ()
        for m in tl.static_range(M):
            at = factors + (row + m) * 4
            used = used + (tl.load(at, cache_modifier=".cg"),)
            cross = cross + (tl.load(at + 1, cache_modifier=".cg"),)
            along_h = along_h + (tl.load(at + 2, cache_modifier=".cg"),)
            along_k = along_k + (tl.load(at + 3, cache_modifier=".cg"),)
        grad_v = tl.load(along_v + n, cache_modifier=".cg") * v.to(tl.float32) + r
        sums = give_part(
            gys, hs, ks, grad_v, used, cross, along_h, along_k, sums, norms,
            grad_hidden, grad_kv, row, k_row, d, d_in, 0, M, D, RESIDUAL,
        )  # fmt: skip
        n += 1
    return sums
