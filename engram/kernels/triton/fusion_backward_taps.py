"""What the taps of `fuse_memory` hand back to earlier tokens (reference: engram/kernels/fusion.py).

With grad_z = gy SiLU'(z), token n gets in branch m: q_m(n) = sum over taps j of w_jm grad_z_m(n + back_j). That enters
the gradients of its value, by r(n) = sum over m of scale_m(n) q_m(n), and of its scales, by q_m(n) . v(n). All branches
are summed here, so that one row of D numbers leaves for each token, where grad_z would be M.

A program takes a block of channels and every `dilation`-th token of a run, whose taps then reach 1, 2, ... of its steps
back: x_m = scale_m v and q of the last tokens and the sums for the weights' gradients all stay in registers. After its
run it goes on for taps - 1 steps, to complete what its own last tokens get. Of sums over all of D it leaves its part:
for each branch gy . v and what q . v adds to it, and for all branches what q . v hands to v.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.device import prefetch, sigmoid
from engram.kernels.triton.fusion_taps import SIZES, document_of, links_of
from engram.kernels.triton.launch import WARP, Strip, at_most, ceil_div


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
def _step(
    grad_out, kv, weights, past_values, past_scales, links, scales, slopes, handed, dots,
    by_tap, xs, qs, gates, ahead, n, first, end, block, d, d_in, N, T, past,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, WIDTH: tl.constexpr,
    BLOCKS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Takes in token n and lets go of the one that is complete then; WHOLE: n is of this run, all its taps linked."""
    later = _load_step(grad_out, kv, links, scales, n + DILATION, N, d, d_in, M, D)
    if D % WIDTH == 0:  # else the last block would reach beyond the rows
        then = tl.cast(tl.minimum(n + 4 * DILATION, N - 1), tl.int64)
        prefetch(grad_out + then * (M * D) + block * WIDTH, M, D, WIDTH)
        prefetch(kv + (then * (M + 1) + M) * D + block * WIDTH, 1, D, WIDTH)
    done = n - (TAPS - 1) * DILATION
    done_own = (done >= first) & (done < end)
    done_row = tl.cast(done, tl.int64) * M
    link = ahead[0]
    v = ahead[1].to(tl.float32)
    own = tl.where(n < end, 1.0, 0.0)
    next_sums = ()
    next_xs = ()
    next_qs = ()
    next_gates = ()
    totals = ()
    r = tl.zeros([WIDTH], tl.float32)
    along = tl.zeros([min(WIDTH, 32)], tl.float32)
    for m in tl.static_range(M):
        done_scale = tl.load(scales + done_row + m, mask=done_own, other=0.0)
        done_slope = tl.load(slopes + done_row + m, mask=done_own, other=0.0)
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
            mine = gz if WHOLE else own * gz
            next_sums = next_sums + (by_tap[m * TAPS + j] + mine * seen[TAPS - 1 - j],)
        for steps in tl.static_range(TAPS):
            q = w[TAPS - 1 - steps] * (gz if WHOLE else tl.where(((link >> (TAPS - 1 - steps)) & 1) != 0, gz, 0.0))
            if steps > 0:
                q += qs[m * (TAPS - 1) + steps - 1]
            if steps < TAPS - 1:
                next_qs = next_qs + (q,)
            else:
                r += done_scale * q
                handed_back = _by_thread(q * x[TAPS - 1], WIDTH)  # its sum is that of s grad_s
                totals = totals + (tl.sum(gate[TAPS - 1] + done_slope * handed_back, 0),)
                along -= done_scale * done_scale / D * handed_back
        next_xs = next_xs + x[: TAPS - 1]
        next_gates = next_gates + gate[: TAPS - 1]
    totals = totals + (tl.sum(along, 0),)
    for m in tl.static_range(M + 1):  # after all loads, which don't pass a store
        tl.store(dots + (done_row + done + m) * BLOCKS + block, totals[m], mask=done_own)
    at = (done_row + done + M) * D + d
    tl.store(handed + at, r.to(handed.dtype.element_ty), mask=done_own & d_in)
    return next_sums, next_xs, next_qs, next_gates, later


@triton.jit(do_not_specialize=[*SIZES, "run"])
def _taps_kernel(
    grad_out, kv, conv, past_values, past_scales, links, scales, slopes, handed, dots, tap_sums, N, T, past, run,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCKS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """r into the values' rows of `handed` [N, (M + 1) D], sums into dots [N, M + 1, blocks]; a run's sums for taps."""
    block, part = tl.program_id(0), tl.program_id(2) * DILATION + tl.program_id(1)
    first = tl.program_id(2) * run
    end = tl.minimum(first + run, N)
    d = block * WIDTH + tl.arange(0, WIDTH)
    d_in = tl.full([WIDTH], True, tl.int1) if D % WIDTH == 0 else d < D
    n = first + tl.program_id(1)
    weights = ()
    by_tap = ()
    xs = ()  # x, and of q what is known of it, of the tokens 1, 2, ... steps before, for each branch
    qs = ()
    gates = ()  # their gy . v, each thread's part of it
    for m in tl.static_range(M):
        for j in tl.static_range(TAPS):
            weights = weights + (tl.load(conv + (j * M + m) * D + d, mask=d_in, other=0.0),)
            by_tap = by_tap + (tl.zeros([WIDTH], tl.float32),)
        for steps in tl.static_range(1, TAPS):
            then = n - steps * DILATION
            row = tl.cast(then, tl.int64) * M
            v = tl.load(kv + (row + then + M) * D + d, mask=(then >= 0) & d_in, other=0.0).to(tl.float32)
            xs = xs + (tl.load(scales + row + m, mask=then >= 0, other=0.0) * v,)
            qs = qs + (tl.zeros([WIDTH], tl.float32),)
            gates = gates + (tl.zeros([min(WIDTH, 32)], tl.float32),)
    ahead = _load_step(grad_out, kv, links, scales, n, N, d, d_in, M, D)
    while n < end + (TAPS - 1) * DILATION:
        by_tap, xs, qs, gates, ahead = _step(
            grad_out, kv, weights, past_values, past_scales, links, scales, slopes, handed, dots,
            by_tap, xs, qs, gates, ahead, n, first, end, block, d, d_in, N, T, past,
            M, D, TAPS, DILATION, WIDTH, BLOCKS, False,
        )  # fmt: skip
        n += DILATION
        while (n + (UNROLL - 1) * DILATION < end) & (((ahead[0] >> 15) & 1) != 0):
            for _ in tl.static_range(UNROLL):  # after which x and q lie in the registers in which they lay before
                by_tap, xs, qs, gates, ahead = _step(
                    grad_out, kv, weights, past_values, past_scales, links, scales, slopes, handed, dots,
                    by_tap, xs, qs, gates, ahead, n, first, end, block, d, d_in, N, T, past,
                    M, D, TAPS, DILATION, WIDTH, BLOCKS, True,
                )  # fmt: skip
                n += DILATION
    for m in tl.static_range(M):
        for j in tl.static_range(TAPS):
            into = tap_sums + ((tl.cast(part, tl.int64) * TAPS + j) * M + m) * D + d
            tl.store(into, by_tap[m * TAPS + j], mask=d_in)


def hand_back(
    handed: Tensor,
    grad_out: Tensor,
    kv: Tensor,
    conv: Tensor,
    documents: Tensor | None,
    past_values: Tensor | None,
    past_scales: Tensor | None,
    alpha: Tensor,
    stats: Tensor,
    eps: float,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """Writes r where `handed`, `[B, T, (M + 1) D]`, has values; returns sums over D in parts, `[B, T, M + 1, parts]`,
    and the gradients of `conv`, the taps with their norm `[taps, M, D]`, in parts, `[parts, taps, M, D]`."""
    B, T, M, D = grad_out.shape
    N, taps = B * T, len(conv)
    past = 0 if past_values is None else past_values.shape[1]
    strip = Strip.of(N, D, 2 * WARP if M * taps <= 16 else WARP, 12, dilation, kv.device)
    links = torch.empty(N, dtype=torch.int32, device=kv.device)
    scales, slopes = (torch.empty(N, M, dtype=torch.float32, device=kv.device) for _ in range(2))
    dots = torch.empty(B, T, M + 1, strip.blocks, dtype=torch.float32, device=kv.device)
    tap_sums = torch.empty(strip.runs * dilation, taps, M, D, dtype=torch.float32, device=kv.device)
    settings = {"M": M, "TAPS": taps, "DILATION": dilation, "UNROLL": max(taps - 1, 1)}
    _prepare_kernel[(ceil_div(N, 64),)](
        documents, alpha, stats, links, scales, slopes, N, T, past, eps,
        **settings, TOKENS=64, BRANCHES=triton.next_power_of_2(M), num_warps=4,
    )  # fmt: skip
    _taps_kernel[(strip.blocks, dilation, strip.runs)](
        grad_out, kv, conv, past_values, past_scales, links, scales, slopes, handed, dots, tap_sums, N, T, past,
        strip.run, **settings, D=D, WIDTH=strip.width, BLOCKS=strip.blocks, num_warps=1, **at_most(168),
    )  # fmt: skip
    return dots, tap_sums
