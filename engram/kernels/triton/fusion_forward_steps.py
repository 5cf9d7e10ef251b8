"""`fuse_memory` with its convolution where no tap sees another token of the call (reference: engram/kernels/fusion.py).

So it is in decoding, a token of each sequence at a time, and for up to `dilation` tokens of each: all earlier taps
reach into the past. A token's results need only its own gates then, and no program waits for another. Tokens are few,
so that what counts is how long one takes: a program takes one branch of a token, with warps that share its channels,
and asks for all that it needs before it waits for any of it. Branches read v and the past each for itself, from the
L2 cache all but once.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.device import sigmoid, sum_each
from engram.kernels.triton.fusion_forward_tokens import gate_of
from engram.kernels.triton.fusion_taps import document_of, links_of
from engram.kernels.triton.launch import Step, at_most


@triton.jit
def _channels(part: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    d = part * WIDTH + tl.arange(0, WIDTH)
    return d, tl.full([WIDTH], True, tl.int1) if part * WIDTH + WIDTH <= D else d < D


@triton.jit
def _ask(
    hidden, kv, query_norm, key_norm, conv_norm, conv_weight, past_values, row, k_row, v_row, slots, there, m,
    first: tl.constexpr, M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, OLD: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """All that AHEAD parts need, from part `first`: last what the gate is made of, and by loads that stay in order (so
    says `volatile`), else the compiler puts off the others until the gate has what it needs."""
    befores = ()
    weights = ()
    hs = ()
    ks = ()
    vs = ()
    norms = ()
    for part in tl.static_range(first, first + AHEAD):
        if part < PARTS:
            d, d_in = _channels(part, D, WIDTH)
            for j in tl.static_range(OLD):  # also of another document, which is known too late
                before = tl.load(past_values + slots[j] * D + d, mask=there[j] & d_in, other=0.0, volatile=True)
                befores = befores + (before,)
    for part in tl.static_range(first, first + AHEAD):
        if part < PARTS:
            d, d_in = _channels(part, D, WIDTH)
            for j in tl.static_range(TAPS - 1 - OLD, TAPS):
                weight = tl.load(conv_weight + (j * M + m) * D + d, mask=d_in, other=0.0, volatile=True)
                weights = weights + (weight,)
    for part in tl.static_range(first, first + AHEAD):
        if part < PARTS:
            d, d_in = _channels(part, D, WIDTH)
            hs = hs + (tl.load(hidden + row * D + d, mask=d_in, other=0.0, volatile=True),)
            ks = ks + (tl.load(kv + k_row * D + d, mask=d_in, other=0.0, volatile=True),)
            vs = vs + (tl.load(kv + v_row * D + d, mask=d_in, other=0.0, volatile=True),)
            query = tl.load(query_norm + m * D + d, mask=d_in, other=0.0)
            key = tl.load(key_norm + m * D + d, mask=d_in, other=0.0)
            norms = norms + (query, key, tl.load(conv_norm + m * D + d, mask=d_in, other=0.0))
    return hs, ks, vs, befores, norms, weights


@triton.jit(do_not_specialize=["past"])  # but T is, so that nothing is divided by a T of 1
def _steps_kernel(
    hidden, kv, query_norm, key_norm, conv_norm, conv_weight, documents, past_values, past_scales,
    out, alpha, stats, T, past, eps, root,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    SQUASH: tl.constexpr, RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Gate and results of a branch of a token."""
    OLD: tl.constexpr = 0 if past_scales is None else TAPS - 1  # taps that may see anything beside the token
    n = tl.program_id(0) // M
    m = tl.program_id(0) % M
    row = tl.cast(n, tl.int64) * M + m
    k_row = row + n
    v_row = k_row + M - m
    there = ()
    slots = ()
    scales = ()
    for j in tl.static_range(OLD):
        at = past + n % T - (TAPS - 1 - j) * DILATION
        slot = tl.cast(n // T, tl.int64) * past + at
        there = there + (at >= 0,)
        slots = slots + (slot,)
        scale = tl.load(past_scales + slot * M + m, mask=at >= 0, other=0.0, volatile=True)
        scales = scales + (scale.to(tl.float32),)
    document = document_of(documents, n, True, T, past)
    link = links_of(documents, document, n, True, T, past, TAPS, DILATION)
    asked = _ask(
        hidden, kv, query_norm, key_norm, conv_norm, conv_weight, past_values, row, k_row, v_row, slots, there, m,
        0, M, D, TAPS, OLD, WIDTH, PARTS, AHEAD,
    )  # fmt: skip
    hh = tl.zeros([WIDTH], tl.float32)
    kk = tl.zeros([WIDTH], tl.float32)
    hk = tl.zeros([WIDTH], tl.float32)
    vv = tl.zeros([WIDTH], tl.float32)
    kept_h = ()
    kept_v = ()
    kept_w = ()
    kept_z = ()
    for first in tl.static_range(0, PARTS, AHEAD):
        if first > 0:
            asked = _ask(
                hidden, kv, query_norm, key_norm, conv_norm, conv_weight, past_values, row, k_row, v_row, slots,
                there, m, first, M, D, TAPS, OLD, WIDTH, PARTS, AHEAD,
            )  # fmt: skip
        hs, ks, vs, befores, norms, weights = asked
        for i in tl.static_range(AHEAD):
            if first + i < PARTS:
                h, k, v = hs[i].to(tl.float32), ks[i].to(tl.float32), vs[i].to(tl.float32)
                query, key, norm = norms[3 * i], norms[3 * i + 1], norms[3 * i + 2].to(tl.float32)
                hh += h * h
                kk += k * k
                hk += h * k * (query.to(tl.float32) * key.to(tl.float32))
                vv += v * v
                z = tl.zeros([WIDTH], tl.float32)
                for j in tl.static_range(OLD):
                    x = scales[j] * befores[i * OLD + j].to(tl.float32)
                    # What has no link may be infinite, and is none of this document's.
                    x = tl.where(((link >> (j + 16)) & 1) != 0, x, 0.0)
                    z += weights[i * (OLD + 1) + j].to(tl.float32) * norm * x
                kept_h = kept_h + (hs[i],)
                kept_v = kept_v + (vs[i],)
                kept_w = kept_w + (weights[i * (OLD + 1) + OLD].to(tl.float32) * norm,)
                kept_z = kept_z + (z,)
    sums = sum_each((hh, kk, hk, vv), 4)
    a, inv_h, inv_k, inv_u = gate_of(sums[2], sums[0], sums[1], sums[3], eps, root, D, SQUASH)
    used = tl.where(document >= 0, a, 0.0)
    for part in tl.static_range(PARTS):
        d, d_in = _channels(part, D, WIDTH)
        v = kept_v[part].to(tl.float32)
        z = kept_z[part] + kept_w[part] * (used * inv_u * v)
        y = z * sigmoid(z) + used * v
        if RESIDUAL:
            y += kept_h[part].to(tl.float32)
        tl.store(out + row * D + d, y.to(out.dtype.element_ty), mask=d_in)
    tl.store(alpha + row, a)
    tl.store(stats + row * 4, sums[2])
    tl.store(stats + row * 4 + 1, inv_h)
    tl.store(stats + row * 4 + 2, inv_k)
    tl.store(stats + row * 4 + 3, inv_u)


def fuse_steps(
    out: Tensor,
    alpha: Tensor,
    stats: Tensor,
    hidden: Tensor,
    kv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor,
    conv_weight: Tensor,
    documents: Tensor | None,
    past_values: Tensor | None,
    past_scales: Tensor | None,
    eps: float,
    squash: bool,
    dilation: int,
    residual: bool,
) -> None:
    """Fills the first three with what `fuse_memory` gives with a convolution, for T up to the dilation."""
    B, T, M, D = hidden.shape
    taps = len(conv_weight)
    past = 0 if past_values is None else past_values.shape[1]
    step = Step.of(D, [hidden, kv, query_norm, key_norm, conv_norm] + [kv, conv_weight] * taps)
    # Left to itself the compiler takes 128 registers where they suffice, so that two programs run on a processor, and
    # spends no moves that wait; but where even 255 don't suffice, as few as 32.
    limit = at_most(255) if step.ahead < step.parts else {}
    _steps_kernel[(B * T * M,)](
        hidden, kv, query_norm, key_norm, conv_norm, conv_weight, documents, past_values, past_scales,
        out, alpha, stats, T, past, eps, 1 / math.sqrt(D),
        M=M, D=D, TAPS=taps, DILATION=dilation, SQUASH=squash, RESIDUAL=residual,
        WIDTH=step.width, PARTS=step.parts, AHEAD=step.ahead, num_warps=step.warps, **limit,
    )  # fmt: skip
