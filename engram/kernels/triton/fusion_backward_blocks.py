"""The backward of `fuse_memory` with a convolution, after its taps (reference: engram/kernels/fusion.py).

All sums over D are there then, in parts: of them first come a few factors for each token and branch. What is left needs
of each channel only itself, so that programs take blocks of channels, and sums for the norms' gradients stay in
registers over a long run of tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.fusion_backward_tokens import gate_slopes, give_part, load_rows, products_of_norms
from engram.kernels.triton.fusion_taps import SIZES, document_of
from engram.kernels.triton.launch import WIDTH, Strip, at_most, ceil_div


@triton.jit(do_not_specialize=SIZES)
def _slopes_kernel(
    dots, grad_alpha, documents, alpha, stats, factors, along_v, N, T, past, root,
    M: tl.constexpr, D: tl.constexpr, SQUASH: tl.constexpr, BLOCKS: tl.constexpr,
    TOKENS: tl.constexpr, BRANCHES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A token's gate, 0 at padding, and slopes for each branch: factors [N, M, 4]; how much v enters grad_v: [N]."""
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
    along = tl.sum(tl.load(dots + at, mask=valid[:, None] & (b < BLOCKS)[None, :], other=0.0), 1)
    tl.store(along_v + n, along, mask=valid)


@triton.jit(do_not_specialize=["N", "run"])
def _give_kernel(
    grad_out, hidden, kv, query_norm, key_norm, factors, along_v, grad_hidden, grad_kv, gate_sums, N, run,
    M: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Gradients of h, k and v, and the sums for the norms' gradients, in a block of channels of a run of tokens.

    What taps hand back to values lies in grad_kv, in their place.
    """
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([WIDTH], tl.float32),)
    d = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    d_in = tl.full([WIDTH], True, tl.int1) if D % WIDTH == 0 else d < D
    norms = products_of_norms(query_norm, key_norm, d, d_in, M, D)
    first = tl.program_id(1) * run
    n = tl.minimum(first + run, N) - 1
    while n >= first:  # from the end, which the taps' programs read last
        row = tl.cast(n, tl.int64) * M
        k_row = tl.cast(n, tl.int64) * (M + 1)
        gys = load_rows(grad_out + row * D + d, D, M, d_in, "evict_first")
        hs = load_rows(hidden + row * D + d, D, M, d_in, "evict_first")
        ks = load_rows(kv + k_row * D + d, D, M, d_in, "evict_first")
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
        sums = give_part(
            gys, hs, ks, grad_v, used, cross, along_h, along_k, sums, norms,
            grad_hidden, grad_kv, row, k_row, d, d_in, 0, M, D, RESIDUAL,
        )  # fmt: skip
        n -= 1
    for m in tl.static_range(M):
        into = gate_sums + (tl.program_id(1).to(tl.int64) * M + m) * D + d
        tl.store(into, sums[m], mask=d_in)


def block_gradients(
    grad_kv: Tensor,
    dots: Tensor,
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
    """As `token_gradients`, with `dots`, and what `grad_kv` holds already, from `hand_back`."""
    B, T, M, D = hidden.shape
    N, blocks = B * T, dots.shape[-1]
    factors, along_v = (torch.empty(N, x, dtype=torch.float32, device=kv.device) for x in (4 * M, 1))
    columns, branches = triton.next_power_of_2(blocks), triton.next_power_of_2(M)
    tokens = max(1, 4096 // (columns * branches))
    _slopes_kernel[(ceil_div(N, tokens),)](
        dots, grad_alpha, documents, alpha, stats, factors, along_v, N, T, past, 1 / math.sqrt(D),
        M=M, D=D, SQUASH=squash, BLOCKS=blocks, TOKENS=tokens, BRANCHES=branches, COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    strip = Strip.of(N, D, WIDTH, 16, 1, kv.device)
    grad_hidden = torch.empty_like(hidden)
    gate_sums = hidden.new_empty(strip.runs, M, D, dtype=torch.float32)
    _give_kernel[(strip.blocks, strip.runs)](
        grad_out, hidden, kv, query_norm, key_norm, factors, along_v, grad_hidden, grad_kv, gate_sums, N, strip.run,
        M=M, D=D, RESIDUAL=residual, WIDTH=strip.width, num_warps=1, **at_most(128),
    )  # fmt: skip
    return grad_hidden, gate_sums
