"""What the taps of `fuse_memory` hand back to earlier tokens (reference: engram/kernels/fusion.py).

With grad_z = gy SiLU'(z), token n gets in branch m: q_m(n) = sum over taps j of w_jm grad_z_m(n + back_j). That enters
the gradients of its value, by r(n) = sum over m of scale_m(n) q_m(n), and of its scales, by q_m(n) . v(n). All branches
are summed here, so that one row of D numbers leaves for each token, where grad_z would be M.

A warp takes a block of channels and every `dilation`-th token of a chunk, whose taps then reach 1, 2, ... of its steps
back: x_m = scale_m v and q of the last tokens and the sums for the weights' gradients all stay in registers. Taps reach
over into the chunk before, whose last tokens get the rest of what is theirs in places of their own. Of sums over all of
D there are parts from each block: for each branch gy . v and what q . v adds to it, and for all branches what q . v
hands to v.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.fusion_taps import SIZES, document_of, links_of
from engram.kernels.triton.launch import ceil_div, prefetch, sigmoid


@triton.jit(do_not_specialize=SIZES)
def _prepare_kernel(
    documents, alpha, stats, links, scales, slopes, N, T, past, eps,
    M: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, UNROLL: tl.constexpr,
    TOKENS: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    """Links of tokens, the scales s of their values, 0 at padding, and how much s grad_s enters a gate's gradient.

    Bit 15 of a token's links says that it and the UNROLL - 1 after it, in steps of the dilation, have all links.
    """
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m = tl.arange(0, BRANCHES)
    valid = n < N
    row = n.to(tl.int64)[:, None] * M + m[None, :]
    both = valid[:, None] & (m < M)[None, :]
    document = document_of(documents, n, valid, T, past)
    a = tl.load(alpha + row, mask=both & (document >= 0)[:, None], other=0.0)
    inv_u = tl.load(stats + row * 4 + 3, mask=both, other=0.0)
    tl.store(scales + row, a * inv_u, mask=both)
    # s = alpha inv_u, with inv_u = (alpha^2 mean(v^2) + eps)^(-1/2): ds / dalpha = eps inv_u^3. A gate that is 0 has no
    # gradient, whatever its scale has.
    tl.store(slopes + row, tl.where(a > 1e-30, eps * inv_u * inv_u / tl.maximum(a, 1e-30), 0.0), mask=both)
    link = links_of(documents, document, n, valid, T, past, TAPS, DILATION)
    ahead = link == (1 << TAPS) - 1
    for steps in tl.static_range(1, UNROLL):
        then = n + steps * DILATION
        later = valid & (then < N)
        document = document_of(documents, then, later, T, past)
        ahead &= links_of(documents, document, then, later, T, past, TAPS, DILATION) == (1 << TAPS) - 1
    tl.store(links + n, link | tl.where(ahead, 1 << 15, 0), mask=valid)


@triton.jit
def _by_thread(x, WIDTH: tl.constexpr):
    """Sums of the channels that a thread holds."""
    THREADS: tl.constexpr = min(WIDTH, 32)
    return tl.sum(tl.reshape(x, [THREADS, WIDTH // THREADS]), 1)


@triton.jit
def _load_step(
    grad_out, kv, links, scales, n, N, d, d_in, M: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """A token's link, value, and gy and scale of each branch."""
    there = n < N
    row = tl.cast(n, tl.int64) * M
    loaded = (
        tl.load(links + n, mask=there, other=0),
        tl.load(kv + (row + n + M) * D + d, mask=there & d_in, other=0.0),
    )
    for m in tl.static_range(M):
        loaded = loaded + (tl.load(grad_out + (row + m) * D + d, mask=there & d_in, other=0.0),)
    for m in tl.static_range(M):
        loaded = loaded + (tl.load(scales + row + m, mask=there, other=0.0),)
    return loaded


@triton.jit
def _linked(
    x, past_values, past_scales, n, link, m, d, d_in, T, past,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
):  # fmt: skip
    """Of x of the last tokens what has a link, and else what lies in the past."""
    seen = ()
    for steps in tl.static_range(TAPS):
        bit = TAPS - 1 - steps
        value = tl.where(((link >> bit) & 1) != 0, x[steps], 0.0)
        if past_values is not None:
            before = ((link >> (bit + 16)) & 1) != 0
            slot = tl.cast(n // T, tl.int64) * past + past + n % T - steps * DILATION
            held = tl.load(past_values + slot * D + d, mask=before & d_in, other=0.0).to(tl.float32)
            value += tl.load(past_scales + slot * M + m, mask=before, other=0.0).to(tl.float32) * held
        seen = seen + (value,)
    return seen


@triton.jit
def _let_go(
    handed, tails, dots, scales, slopes, q, x, gate, done, first, chunk, block, d, d_in, N,
    M: tl.constexpr, D: tl.constexpr, REACH: tl.constexpr, WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """What is known in this chunk of r and the sums of token `done`, which may lie before it, in reach of its taps."""
    own = done >= first
    there = done >= 0
    row = tl.cast(done, tl.int64) * M
    slot = tl.where(own, done, N + chunk * REACH + done - first)
    totals = ()
    r = tl.zeros([WIDTH], tl.float32)
    along = tl.zeros([min(WIDTH, 32)], tl.float32)
    for m in tl.static_range(M):
        scale = tl.load(scales + row + m, mask=there, other=0.0)
        slope = tl.load(slopes + row + m, mask=there, other=0.0)
        r += scale * q[m]
        handed_back = _by_thread(q[m] * x[m], WIDTH)  # its sum is that of s grad_s
        totals = totals + (tl.sum(gate[m] + slope * handed_back, 0),)
        along -= scale * scale / D * handed_back
    totals = totals + (tl.sum(along, 0),)
    for m in tl.static_range(M + 1):  # after all loads, which don't pass a store
        tl.store(dots + (tl.cast(slot, tl.int64) * (M + 1) + m) * BLOCKS + block, totals[m], mask=there)
    at = (row + done + M) * D + d
    tl.store(handed + at, r.to(handed.dtype.element_ty), mask=own & d_in)
    if REACH > 0:
        at = tl.cast(slot - N, tl.int64) * D + d
        tl.store(tails + at, r.to(tails.dtype.element_ty), mask=there & (done < first) & d_in)


@triton.jit
def _step(
    grad_out, kv, weights, past_values, past_scales, links, scales, slopes, handed, tails, dots,
    by_tap, xs, qs, gates, ahead, n, first, end, chunk, block, d, d_in, N, T, past,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Takes in token n and lets go of the one that is complete then; WHOLE: all taps of n are linked."""
    later = _load_step(grad_out, kv, links, scales, n + DILATION, end, d, d_in, M, D)
    if D % WIDTH == 0:  # else the last block would reach beyond the rows
        then = tl.cast(tl.minimum(n + 4 * DILATION, N - 1), tl.int64)
        prefetch(grad_out + then * (M * D) + block * WIDTH, M, D, WIDTH)
        prefetch(kv + (then * (M + 1) + M) * D + block * WIDTH, 1, D, WIDTH)
    link = ahead[0]
    v = ahead[1].to(tl.float32)
    next_sums = ()
    next_xs = ()
    next_qs = ()
    next_gates = ()
    done_q = ()
    done_x = ()
    done_gate = ()
    for m in tl.static_range(M):
        w = weights[m * TAPS : (m + 1) * TAPS]
        gy = ahead[2 + m].to(tl.float32)
        gate = (_by_thread(gy * v, WIDTH),) + gates[m * (TAPS - 1) : (m + 1) * (TAPS - 1)]
        x = (ahead[2 + M + m] * v,) + xs[m * (TAPS - 1) : (m + 1) * (TAPS - 1)]
        seen = x
        if not WHOLE:
            seen = _linked(x, past_values, past_scales, n, link, m, d, d_in, T, past, M, D, TAPS, DILATION)
        z = w[0] * seen[TAPS - 1]
        for j in tl.static_range(1, TAPS):
            z += w[j] * seen[TAPS - 1 - j]
        sig = sigmoid(z)
        gz = gy * (sig + sig * (z - z * sig))
        for j in tl.static_range(TAPS):
            next_sums = next_sums + (by_tap[m * TAPS + j] + gz * seen[TAPS - 1 - j],)
        for steps in tl.static_range(TAPS):
            q = w[TAPS - 1 - steps] * (gz if WHOLE else ((link >> (TAPS - 1 - steps)) & 1).to(tl.float32) * gz)
            if steps > 0:
                q += qs[m * (TAPS - 1) + steps - 1]
            if steps < TAPS - 1:
                next_qs = next_qs + (q,)
            else:
                done_q = done_q + (q,)
        next_xs = next_xs + x[: TAPS - 1]
        next_gates = next_gates + gate[: TAPS - 1]
        done_x = done_x + (x[TAPS - 1],)
        done_gate = done_gate + (gate[TAPS - 1],)
    _let_go(
        handed, tails, dots, scales, slopes, done_q, done_x, done_gate, n - (TAPS - 1) * DILATION, first, chunk, block,
        d, d_in, N, M, D, (TAPS - 1) * DILATION, WIDTH, BLOCKS,
    )  # fmt: skip
    return next_sums, next_xs, next_qs, next_gates, later


@triton.jit
def hand_back(
    grad_out, kv, conv, past_values, past_scales, links, scales, slopes, handed, tails, dots,
    n, first, end, chunk, block, N, T, past,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, UNROLL: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Of token n of a chunk and every DILATION-th after it, in a block of channels; returns the sums for taps.

    r goes to the values' rows of `handed` [N, (M + 1) D], sums to dots [slots, M + 1, blocks]; of the tokens before the
    chunk to tails [chunks - 1, reach, D], and to slots from N on.
    """
    d = block * WIDTH + tl.arange(0, WIDTH)
    d_in = tl.full([WIDTH], True, tl.int1) if D % WIDTH == 0 else d < D
    weights = ()
    by_tap = ()
    xs = ()  # x, and of q what is known of it, of the tokens 1, 2, ... steps before, for each branch
    qs = ()
    gates = ()  # their gy . v, each thread's part of it
    for m in tl.static_range(M):
        for j in tl.static_range(TAPS):
            weight = tl.load(conv + (j * M + m) * D + d, mask=d_in, other=0.0, eviction_policy="evict_last")
            weights = weights + (weight,)
            by_tap = by_tap + (tl.zeros([WIDTH], tl.float32),)
        for steps in tl.static_range(1, TAPS):
            then = n - steps * DILATION
            row = tl.cast(then, tl.int64) * M
            v = tl.load(kv + (row + then + M) * D + d, mask=(then >= 0) & d_in, other=0.0).to(tl.float32)
            xs = xs + (tl.load(scales + row + m, mask=then >= 0, other=0.0) * v,)
            qs = qs + (tl.zeros([WIDTH], tl.float32),)
            gates = gates + (tl.zeros([min(WIDTH, 32)], tl.float32),)
    ahead = _load_step(grad_out, kv, links, scales, n, end, d, d_in, M, D)
    while n < end:
        by_tap, xs, qs, gates, ahead = _step(
            grad_out, kv, weights, past_values, past_scales, links, scales, slopes, handed, tails, dots,
            by_tap, xs, qs, gates, ahead, n, first, end, chunk, block, d, d_in, N, T, past,
            M, D, TAPS, DILATION, WIDTH, BLOCKS, False,
        )  # fmt: skip
        n += DILATION
        while (n + (UNROLL - 1) * DILATION < end) & (((ahead[0] >> 15) & 1) != 0):
            for _ in tl.static_range(UNROLL):  # after which x and q lie in the registers in which they lay before
                by_tap, xs, qs, gates, ahead = _step(
                    grad_out, kv, weights, past_values, past_scales, links, scales, slopes, handed, tails, dots,
                    by_tap, xs, qs, gates, ahead, n, first, end, chunk, block, d, d_in, N, T, past,
                    M, D, TAPS, DILATION, WIDTH, BLOCKS, True,
                )  # fmt: skip
                n += DILATION
    for steps in tl.static_range(TAPS - 1):
        q = ()
        x = ()
        gate = ()
        for m in tl.static_range(M):
            q = q + (qs[m * (TAPS - 1) + steps],)
            x = x + (xs[m * (TAPS - 1) + steps],)
            gate = gate + (gates[m * (TAPS - 1) + steps],)
        _let_go(
            handed, tails, dots, scales, slopes, q, x, gate, n - (steps + 1) * DILATION, first, chunk, block,
            d, d_in, N, M, D, (TAPS - 1) * DILATION, WIDTH, BLOCKS,
        )  # fmt: skip
    return by_tap


def prepare(
    documents: Tensor | None, alpha: Tensor, stats: Tensor, past: int, taps: int, dilation: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Links of tokens `[B T]`; scales of their values and slopes, `[B T, M]`."""
    B, T, M = alpha.shape
    N = B * T
    links = torch.empty(N, dtype=torch.int32, device=alpha.device)
    scales, slopes = (torch.empty(N, M, dtype=torch.float32, device=alpha.device) for _ in range(2))
    _prepare_kernel[(ceil_div(N, 64),)](
        documents, alpha, stats, links, scales, slopes, N, T, past, eps,
        M=M, TAPS=taps, DILATION=dilation, UNROLL=unroll(taps), TOKENS=64, BRANCHES=triton.next_power_of_2(M),
        num_warps=4,
    )  # fmt: skip
    return links, scales, slopes


def unroll(taps: int) -> int:
    """Steps that are taken together."""
    return max(taps - 1, 1)
