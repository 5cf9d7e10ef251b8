"""What the taps of `fuse_memory` hand back to earlier tokens (reference: engram/kernels/fusion.py).

With grad_z = gy SiLU'(z), token n gets in branch m: q_m(n) = sum over taps j of w_jm grad_z_m(n + back_j). That enters
the gradients of its value, by r(n) = sum over m of scale_m(n) q_m(n), and of its scales, by q_m(n) . v(n). All branches
are summed here, so that one row of D numbers leaves for each token, where grad_z would be M.

A program takes a block of channels and every `dilation`-th token of a run, whose taps then reach 1, 2, ... of its steps
back: q of the last tokens, their values, the weights and the sums for the weights' gradients all stay in registers.
After its run it goes on for taps - 1 steps, to complete what its own last tokens get.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.fusion_taps import SIZES, document_of, links_of, seen_scale
from engram.kernels.triton.launch import Strip, ceil_div, sigmoid


@triton.jit(do_not_specialize=SIZES)
def _prepare_kernel(
    documents, alpha, stats, links, scales, N, T, past,
    M: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, TOKENS: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    """Links of tokens, and the scales of their values, 0 at padding."""
    n = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    m = tl.arange(0, BRANCHES)
    valid = n < N
    row = n.to(tl.int64)[:, None] * M + m[None, :]
    both = valid[:, None] & (m < M)[None, :]
    document = document_of(documents, n, valid, T, past)
    a = tl.load(alpha + row, mask=both & (document >= 0)[:, None], other=0.0)
    inv_u = tl.load(stats + row * 4 + 3, mask=both, other=0.0)
    tl.store(scales + row, a * inv_u, mask=both)
    tl.store(links + n, links_of(documents, document, n, valid, T, past, TAPS, DILATION), mask=valid)


@triton.jit(do_not_specialize=[*SIZES, "run"])
def _taps_kernel(
    grad_out, kv, conv, past_values, past_scales, links, scales, handed, dots, tap_sums, N, T, past, run,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    WIDTH: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """r into the value's rows of `handed` [N, (M + 1) D]; q . v into dots [N, M, blocks]; the taps' sums over a run."""
    block, part = tl.program_id(0), tl.program_id(2) * DILATION + tl.program_id(1)
    first = tl.program_id(2) * run
    end = tl.minimum(first + run, N)
    d = block * WIDTH + tl.arange(0, WIDTH)
    d_in = tl.full([WIDTH], True, tl.int1) if EVEN else d < D
    n = first + tl.program_id(1)
    weights = ()
    by_tap = ()
    qs = ()
    for m in tl.static_range(M):
        for j in tl.static_range(TAPS):
            weights = weights + (tl.load(conv + (j * M + m) * D + d, mask=d_in, other=0.0),)
            by_tap = by_tap + (tl.zeros([WIDTH], tl.float32),)
        for _ in tl.static_range(TAPS - 1):
            qs = qs + (tl.zeros([WIDTH], tl.float32),)
    vs = ()
    for steps in tl.static_range(1, TAPS):
        then = n - steps * DILATION
        v_at = (tl.cast(then, tl.int64) * (M + 1) + M) * D + d
        vs = vs + (tl.load(kv + v_at, mask=(then >= 0) & d_in, other=0.0).to(tl.float32),)
    link = tl.load(links + n, mask=n < N, other=0)
    while n < end + (TAPS - 1) * DILATION:
        there = n < N
        next_link = tl.load(links + n + DILATION, mask=n + DILATION < N, other=0)  # early: scales wait for it
        wide_n = tl.cast(n, tl.int64)
        row = wide_n * M
        v = tl.load(kv + (row + wide_n + M) * D + d, mask=there & d_in, other=0.0).to(tl.float32)
        gys = ()
        for m in tl.static_range(M):
            gys = gys + (tl.load(grad_out + (row + m) * D + d, mask=there & d_in, other=0.0),)
        vs = (v,) + vs  # of the token itself and those 1, 2, ... steps before
        seen = ()
        linked = ()
        for j in tl.static_range(TAPS):
            value = vs[TAPS - 1 - j]  # of another document or sequence where there is no link, and scaled by 0
            if past_values is not None:
                before = ((link >> (j + 16)) & 1) != 0
                slot = tl.cast(n // T, tl.int64) * past + past + n % T - (TAPS - 1 - j) * DILATION
                held = tl.load(past_values + slot * D + d, mask=before & d_in, other=0.0)
                value = tl.where(before, held.to(tl.float32), value)
            seen = seen + (value,)
            linked = linked + (((link >> j) & 1).to(tl.float32),)
        own = tl.where(n < end, 1.0, 0.0)
        done = n - (TAPS - 1) * DILATION  # the token whose q is complete after this step
        done_own = (done >= first) & (done < end)
        done_row = tl.cast(done, tl.int64) * M
        r = tl.zeros([WIDTH], tl.float32)
        sums = ()
        next_qs = ()
        totals = ()
        for m in tl.static_range(M):
            z = tl.zeros([WIDTH], tl.float32)
            s = ()
            for j in tl.static_range(TAPS):
                s = s + (seen_scale(scales, past_scales, n, wide_n, link, j, (TAPS - 1 - j) * DILATION, m, T, past, M),)
                z += weights[m * TAPS + j] * (s[j] * seen[j])
            sig = sigmoid(z)
            gz = gys[m].to(tl.float32) * (sig + sig * z * (1.0 - sig))
            for j in tl.static_range(TAPS):
                sums = sums + (by_tap[m * TAPS + j] + (s[j] * own * gz) * seen[j],)
            for steps in tl.static_range(TAPS):
                q = weights[m * TAPS + TAPS - 1 - steps] * (linked[TAPS - 1 - steps] * gz)
                if steps > 0:
                    q += qs[m * (TAPS - 1) + steps - 1]
                if steps < TAPS - 1:
                    next_qs = next_qs + (q,)
                else:
                    r += tl.load(scales + done_row + m, mask=done_own, other=0.0) * q
                    totals = totals + (tl.sum(q * vs[TAPS - 1], 0),)
        for m in tl.static_range(M):  # after all loads, which don't pass a store
            tl.store(dots + (done_row + m) * BLOCKS + block, totals[m], mask=done_own)
        at = (done_row + done + M) * D + d
        tl.store(handed + at, r.to(handed.dtype.element_ty), mask=done_own & d_in)
        by_tap = sums
        qs = next_qs
        vs = vs[: TAPS - 1]
        link = next_link
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
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """Writes r where `handed`, `[B, T, (M + 1) D]`, has values; returns q . v in parts, `[B, T, M, parts]`, and the
    gradients of `conv`, the taps with their norm `[taps, M, D]`, in parts to be summed, `[parts, taps, M, D]`."""
    B, T, M, D = grad_out.shape
    N, taps = B * T, len(conv)
    past = 0 if past_values is None else past_values.shape[1]
    strip = Strip.of(N, D, M * taps, dilation, kv.device)
    links = torch.empty(N, dtype=torch.int32, device=kv.device)
    scales = torch.empty(N, M, dtype=torch.float32, device=kv.device)
    dots = torch.empty(B, T, M, strip.blocks, dtype=torch.float32, device=kv.device)
    tap_sums = torch.empty(strip.runs * dilation, taps, M, D, dtype=torch.float32, device=kv.device)
    settings = {"M": M, "TAPS": taps, "DILATION": dilation}
    _prepare_kernel[(ceil_div(N, 64),)](
        documents, alpha, stats, links, scales, N, T, past,
        **settings, TOKENS=64, BRANCHES=triton.next_power_of_2(M), num_warps=4,
    )  # fmt: skip
    _taps_kernel[(strip.blocks, dilation, strip.runs)](
        grad_out, kv, conv, past_values, past_scales, links, scales, handed, dots, tap_sums, N, T, past, strip.run,
        **settings, D=D, WIDTH=strip.width, EVEN=D % strip.width == 0, BLOCKS=strip.blocks, num_warps=1,
    )  # fmt: skip
    return dots, tap_sums
