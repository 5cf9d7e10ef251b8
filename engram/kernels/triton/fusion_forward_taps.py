"""`fuse_memory` with its convolution, in one launch (reference: engram/kernels/fusion.py).

Results of a block of channels need gates, which are sums over all channels, and the scales of earlier tokens. So there
are two kinds of work: the gates of a token, and the results of a block of channels over a chunk of tokens, which finds
h and v in the L2 cache, where the gates have left them. Programs draw tickets, numbered in the order in which work is
to begin: chunk by chunk, the results of a chunk some chunks after its gates. Before results, a program waits until as
many gates have been stored as its chunk has, which can't be forever: their tickets were drawn before its own.
A token's rows are asked for when the gates of one some hundred tokens before it are made.

Atomics order the work and enter no number: the same inputs give the same bits.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.device import prefetch_bulk, sigmoid
from engram.kernels.triton.fusion_forward_tokens import store_gates, store_numbers
from engram.kernels.triton.fusion_taps import SHOWN, SIZES, document_of, links_of
from engram.kernels.triton.launch import Gates, Turns, at_most, ceil_div, in_bulk
from engram.kernels.triton.parts import product

_EARLY = 6 * 2**20  # bytes of tokens on their way to the L2 cache, where those of `Turns` lie too
_MANY = 1024  # tokens: one more launch, for the product of the norms, pays


@triton.jit
def _wait_for(stored, chunk, N, CHUNK: tl.constexpr, REACH: tl.constexpr):
    """Until all gates that a chunk's results need have been stored."""
    needed = tl.maximum(chunk * CHUNK - REACH, 0) // CHUNK
    while needed <= chunk:
        tokens = tl.minimum(N - needed * CHUNK, CHUNK)
        found = tl.atomic_add(stored + needed, 0, sem="acquire")
        while found < tokens:
            found = tl.atomic_add(stored + needed, 0, sem="acquire")
        needed += 1


@triton.jit
def _results(
    hidden, kv, conv_norm, conv_weight, past_values, past_scales, links, scales, alpha, out, n, end, d0, T, past, zero,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """alpha v + SiLU(convolution), and h, of the channels from d0 of token n and every DILATION-th after it, before
    `end`."""
    PART: tl.constexpr = BLOCK // THREADS
    # What all channels share each thread loads for itself, from addresses that differ as far as the compiler knows, as
    # `zero` might be any number: else these numbers go to registers that a warp shares, by moves that wait for them.
    thread = tl.arange(0, THREADS)
    links, scales, alpha = links + thread * zero, scales + thread * zero, alpha + thread * zero
    d = d0 + thread[:, None] * PART + tl.arange(0, PART)[None, :]
    d_in = tl.full([THREADS, PART], True, tl.int1) if D % BLOCK == 0 else d < D
    weights = ()
    old_s = ()
    for m in tl.static_range(M):
        norm = tl.load(conv_norm + m * D + d, mask=d_in, other=0.0, eviction_policy="evict_last").to(tl.float32)
        for j in tl.static_range(TAPS):
            weight = tl.load(conv_weight + (j * M + m) * D + d, mask=d_in, other=0.0, eviction_policy="evict_last")
            weights = weights + (weight.to(tl.float32) * norm,)
        for steps in tl.static_range(1, TAPS):
            then = n - steps * DILATION
            old_s = old_s + (tl.load(scales + tl.cast(then, tl.int64) * M + m, mask=then >= 0, other=0.0),)
    old_v = ()
    for steps in tl.static_range(1, TAPS):
        then = n - steps * DILATION
        v_at = (tl.cast(then, tl.int64) * (M + 1) + M) * D + d
        old_v = old_v + (tl.load(kv + v_at, mask=(then >= 0) & d_in, other=0.0).to(tl.float32),)
    row = tl.cast(n, tl.int64) * M
    link = tl.load(links + n)
    next_v = tl.load(kv + (row + n + M) * D + d, mask=d_in, other=0.0)
    next_h = ()
    next_a = ()
    next_s = ()
    for m in tl.static_range(M):
        if RESIDUAL:
            next_h = next_h + (
                tl.load(hidden + (row + m) * D + d, mask=d_in, other=0.0, eviction_policy="evict_first"),
            )
        next_a = next_a + (tl.load(alpha + row + m),)
        next_s = next_s + (tl.load(scales + row + m),)
    while n < end:
        v = next_v.to(tl.float32)
        hs = next_h
        gates = next_a
        vs = (v,) + old_v  # of the token itself and those 1, 2, ... steps before
        now = link
        at = tl.cast(n, tl.int64) * M
        # What the next token needs is asked for before this one's results are made; the last asks for its own again.
        then = n + DILATION
        row = tl.cast(tl.where(then < end, then, n), tl.int64)
        link = tl.load(links + row)
        next_v = tl.load(kv + (row * (M + 1) + M) * D + d, mask=d_in, other=0.0)
        row *= M
        ss = ()
        kept_s = ()
        next_h = ()
        next_a = ()
        later_s = ()
        for m in tl.static_range(M):
            if RESIDUAL:
                h = tl.load(hidden + (row + m) * D + d, mask=d_in, other=0.0, eviction_policy="evict_first")
                next_h = next_h + (h,)
            next_a = next_a + (tl.load(alpha + row + m),)
            later_s = later_s + (tl.load(scales + row + m),)
            ss = ss + (next_s[m],)
            for steps in tl.static_range(1, TAPS):
                ss = ss + (old_s[m * (TAPS - 1) + steps - 1],)
            for steps in tl.static_range(TAPS - 1):
                kept_s = kept_s + (ss[m * TAPS + steps],)
        seen = ()
        for j in tl.static_range(TAPS):
            # Without a link it is of another document or sequence, whose infinities are none of this one's.
            value = vs[TAPS - 1 - j]
            if j < TAPS - 1:
                value = tl.where(((now >> j) & 1)[:, None] != 0, value, 0.0)
            if past_values is not None:
                before = ((now >> (j + 16)) & 1) != 0
                slot = tl.cast(n // T, tl.int64) * past + past + n % T - (TAPS - 1 - j) * DILATION
                held = tl.load(past_values + slot * D + d, mask=before[:, None] & d_in, other=0.0)
                value = tl.where(before[:, None], held.to(tl.float32), value)
            seen = seen + (value,)
        shown = (now & SHOWN) != 0
        for m in tl.static_range(M):
            z = tl.zeros([THREADS, PART], tl.float32)
            for j in tl.static_range(TAPS):
                s = tl.where(((now >> j) & 1) != 0, ss[m * TAPS + TAPS - 1 - j], 0.0)
                if past_scales is not None:
                    before = ((now >> (j + 16)) & 1) != 0
                    slot = tl.cast(n // T, tl.int64) * past + past + n % T - (TAPS - 1 - j) * DILATION
                    held = tl.load(past_scales + slot * M + m + thread * zero, mask=before, other=0.0)
                    s += held.to(tl.float32)
                z += weights[m * TAPS + j] * (s[:, None] * seen[j])
            y = z * sigmoid(z) + tl.where(shown, gates[m], 0.0)[:, None] * v
            if RESIDUAL:
                y += hs[m].to(tl.float32)
            into = out + (at + m) * D + d
            tl.store(into, y.to(out.dtype.element_ty), mask=d_in, eviction_policy="evict_first")
        old_v = vs[: TAPS - 1]
        old_s = kept_s
        next_s = later_s
        n = then


@triton.jit(do_not_specialize=[*SIZES, "early", "lag", "tickets", "zero"])
def _turns_kernel(
    hidden, kv, query_norm, key_norm, conv_norm, conv_weight, documents, past_values, past_scales,
    out, alpha, stats, links, scales, counters, N, T, past, early, lag, tickets, zero, eps, root,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr,
    SQUASH: tl.constexpr, RESIDUAL: tl.constexpr, BRANCHES: tl.constexpr, WIDTH: tl.constexpr, AHEAD: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Gates and results, by tickets: one for the gates of each token of a chunk, then one for each phase and block of
    channels of the chunk `lag` before it."""
    TURN: tl.constexpr = CHUNK + DILATION * ((D + BLOCK - 1) // BLOCK)
    m = tl.arange(0, BRANCHES)
    stored = counters + 1
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    while ticket < tickets:
        turn, place = ticket // TURN, ticket % TURN
        if place < CHUNK:
            n = turn * CHUNK + place
            if n < N:
                if BULK:
                    then = tl.cast(n + early, tl.int64)
                    prefetch_bulk(hidden + then * (M * D), M * D, then < N, THREADS)
                    prefetch_bulk(kv + then * ((M + 1) * D), (M + 1) * D, then < N, THREADS)
                _, scale = store_gates(
                    hidden, kv, query_norm, key_norm, alpha, stats, n, eps, root, M, D, SQUASH, BRANCHES, WIDTH, AHEAD
                )
                document = document_of(documents, n, True, T, past)
                shown = document >= 0
                link = links_of(documents, document, n, True, T, past, TAPS, DILATION)
                tl.store(links + n, tl.where(shown, link | SHOWN, link))
                m_in = tl.full([BRANCHES], True, tl.int1) if M == BRANCHES else m < M
                store_numbers(scales + tl.cast(n, tl.int64) * M, tl.where(shown, scale, 0.0), m, m_in, 1)
                tl.debug_barrier()  # what all threads have stored is stored before it is counted
                tl.atomic_add(stored + turn, 1, sem="release")
        else:
            chunk = turn - lag
            n = chunk * CHUNK + (place - CHUNK) % DILATION
            end = tl.minimum(chunk * CHUNK + CHUNK, N)
            if (chunk >= 0) & (n < end):
                _wait_for(stored, chunk, N, CHUNK, (TAPS - 1) * DILATION)
                tl.debug_barrier()
                _results(
                    hidden, kv, conv_norm, conv_weight, past_values, past_scales, links, scales, alpha, out,
                    n, end, (place - CHUNK) // DILATION * BLOCK, T, past, zero,
                    M, D, TAPS, DILATION, RESIDUAL, BLOCK, THREADS,
                )  # fmt: skip
        ticket = tl.atomic_add(counters, 1, sem="relaxed")


def fuse_taps(
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
    """Fills the first three with what `fuse_memory` gives with a convolution."""
    B, T, M, D = hidden.shape
    N, taps = B * T, len(conv_weight)
    past = 0 if past_values is None else past_values.shape[1]
    gates = Gates.of(M, D, [hidden, kv, query_norm, key_norm])
    turns = Turns.of(N, M, D, taps, dilation, gates.warps, hidden.device)
    links = torch.empty(N, dtype=torch.int32, device=hidden.device)
    scales = torch.empty(N, M, dtype=torch.float32, device=hidden.device)
    many = N >= _MANY
    norm, other_norm = (product(query_norm, key_norm), None) if many else (query_norm, key_norm)
    bulk, early = many and in_bulk(hidden, kv.view(B, T, M + 1, D)), _EARLY // ((2 * M + 1) * D * kv.itemsize) + 1
    counters = torch.zeros(1 + ceil_div(N, turns.chunk), dtype=torch.int32, device=hidden.device)
    _turns_kernel[(turns.programs,)](
        hidden, kv, norm, other_norm, conv_norm, conv_weight, documents, past_values, past_scales, out, alpha, stats,
        links, scales, counters, N, T, past, early, turns.lag, turns.tickets, 0, eps, 1 / math.sqrt(D),
        M=M, D=D, TAPS=taps, DILATION=dilation, SQUASH=squash, RESIDUAL=residual, BRANCHES=gates.branches,
        WIDTH=gates.width, AHEAD=gates.ahead, CHUNK=turns.chunk, BLOCK=turns.block,
        THREADS=min(gates.warps * 32, turns.block), BULK=bulk, num_warps=gates.warps, **at_most(turns.registers),
    )  # fmt: skip
