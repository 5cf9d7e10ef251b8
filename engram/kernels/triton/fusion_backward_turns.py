"""The backward of `fuse_memory` with a convolution, in one launch (reference: engram/kernels/fusion.py).

Three kinds of work, of which the last needs what the first finds: what taps hand back in a chunk of tokens, the factors
of its tokens, their gradients. The first is bound by arithmetic and the last by memory, and what the first reads and
writes is still in the L2 cache for the last if that follows soon. So warps draw tickets, numbered in the order in which
work is to begin: chunk by chunk, factors and gradients some chunks after the taps. Before its work a warp waits until
what that needs has been counted, which can't be forever: whoever counts drew an earlier ticket, and works already.

Sums for parameters' gradients lie in a ring of rows: a chunk adds to those of the chunk RING before it, when that has.
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

from engram.kernels.triton.fusion_backward_blocks import give, store_factors
from engram.kernels.triton.fusion_backward_taps import hand_back, prepare, unroll
from engram.kernels.triton.fusion_taps import SIZES
from engram.kernels.triton.launch import Queue, at_most


@triton.jit
def _wait_for(counter, needed):
    """Until so many have been counted, and what they have stored can be read."""
    found = tl.atomic_add(counter, 0, sem="acquire")
    while found < needed:
        found = tl.atomic_add(counter, 0, sem="acquire")


@triton.jit
def _count(counter):
    """One more, whose stores can be read by those who find it counted."""
    tl.debug_barrier()  # what all threads have stored is stored before it is counted
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _add_to(into, xs, again, d_in, COUNT: tl.constexpr, D: tl.constexpr):
    """Adds to rows, past the L1 cache, or where there is nothing yet stores; all are asked for before one is stored."""
    more = ()
    for i in tl.static_range(COUNT):
        before = tl.load(into + i * D, mask=d_in & again, other=0.0, cache_modifier=".cg")
        more = more + (before + xs[i],)
    for i in tl.static_range(COUNT):
        tl.store(into + i * D, more[i], mask=d_in)


@triton.jit(do_not_specialize=[*SIZES, "chunks", "lag", "later", "tickets"])
def _turns_kernel(
    grad_out, grad_alpha, hidden, kv, query_norm, key_norm, conv, documents, past_values, past_scales, alpha, stats,
    links, scales, slopes, tails, dots, factors, along_v, grad_hidden, grad_kv, tap_sums, gate_sums, counters,
    N, T, past, chunks, lag, later, tickets, root,
    M: tl.constexpr, D: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, UNROLL: tl.constexpr,
    SQUASH: tl.constexpr, RESIDUAL: tl.constexpr, BRANCHES: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr, RING: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """In each turn tickets for the taps of a chunk, the factors of that `lag` before it, gradients of that `later`."""
    REACH: tl.constexpr = (TAPS - 1) * DILATION
    HANDED: tl.constexpr = BLOCKS * DILATION
    FACTORS: tl.constexpr = (CHUNK + TOKENS - 1) // TOKENS
    RUNS: tl.constexpr = (CHUNK + RUN - 1) // RUN
    WIDE: tl.constexpr = (D + WIDTH - 1) // WIDTH
    GIVEN: tl.constexpr = WIDE * RUNS
    TURN: tl.constexpr = HANDED + FACTORS + GIVEN
    handed = counters + 1
    found = handed + chunks
    given = found + chunks
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    while ticket < tickets:
        turn, place = ticket // TURN, ticket % TURN
        if place < HANDED:
            if turn < chunks:
                block, phase = place // DILATION, place % DILATION
                first = turn * CHUNK
                by_tap = hand_back(
                    grad_out, kv, conv, past_values, past_scales, links, scales, slopes, grad_kv, tails, dots,
                    first + phase, first, tl.minimum(first + CHUNK, N), turn, block, N, T, past,
                    M, D, TAPS, DILATION, UNROLL, BLOCK, BLOCKS,
                )  # fmt: skip
                again = turn >= RING
                if again:
                    _wait_for(handed + turn - RING, HANDED)
                    tl.debug_barrier()
                d = block * BLOCK + tl.arange(0, BLOCK)
                part = tl.cast(turn % RING * DILATION + phase, tl.int64)
                _add_to(tap_sums + part * (M * TAPS * D) + d, by_tap, again, d < D, M * TAPS, D)
                _count(handed + turn)
        elif place < HANDED + FACTORS:
            chunk = turn - lag
            if (chunk >= 0) & (chunk < chunks):
                first = chunk * CHUNK
                start = first + (place - HANDED) * TOKENS
                end = tl.minimum(first + CHUNK, N)
                _wait_for(handed + chunk, HANDED)
                tail = end
                if chunk + 1 < chunks:
                    _wait_for(handed + chunk + 1, HANDED)
                    tail = end - REACH
                tl.debug_barrier()
                store_factors(
                    dots, grad_alpha, documents, alpha, stats, factors, along_v, start, end, tail, N + chunk * REACH,
                    N, T, past, root, M, D, SQUASH, BLOCKS, TOKENS, BRANCHES, COLUMNS,
                )  # fmt: skip
                _count(found + chunk)
        else:
            chunk = turn - later
            if (chunk >= 0) & (chunk < chunks):
                block, run = (place - HANDED - FACTORS) % WIDE, (place - HANDED - FACTORS) // WIDE
                first = chunk * CHUNK
                end = tl.minimum(first + CHUNK, N)
                tail = tl.where(chunk + 1 < chunks, end - REACH, end)
                start = first + run * RUN
                _wait_for(found + chunk, FACTORS)
                tl.debug_barrier()
                sums = give(
                    grad_out, hidden, kv, query_norm, key_norm, factors, along_v, grad_hidden, grad_kv, tails,
                    start, tl.minimum(start + RUN, end), tail, chunk * REACH, block, M, D, REACH, RESIDUAL, WIDTH,
                )  # fmt: skip
                again = chunk >= RING
                if again:
                    _wait_for(given + chunk - RING, GIVEN)
                    tl.debug_barrier()
                d = block * WIDTH + tl.arange(0, WIDTH)
                part = tl.cast(chunk % RING * RUNS + run, tl.int64)
                _add_to(gate_sums + part * (M * D) + d, sums, again, d < D, M, D)
                _count(given + chunk)
        ticket = tl.atomic_add(counters, 1, sem="relaxed")


def gradients_in_turns(
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
    conv: Tensor,
    past_values: Tensor | None,
    past_scales: Tensor | None,
    eps: float,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `token_gradients`, and the gradients of `conv`, the taps with their norm `[taps, M, D]`, in parts to be
    summed, `[parts, M, taps, D]`."""
    B, T, M, D = hidden.shape
    N, taps, reach = B * T, len(conv), (len(conv) - 1) * dilation
    queue = Queue.of(N, M, D, taps, dilation, hidden.device)
    links, scales, slopes = prepare(documents, alpha, stats, past, taps, dilation, eps)
    late = (queue.chunks - 1) * reach

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    tails, dots = kv.new_empty(late, D), floats(N + late, M + 1, queue.blocks)
    factors, along_v = floats(N, M, 4), floats(N)
    ring = min(queue.ring, queue.chunks)
    tap_sums, gate_sums = floats(ring * dilation, M, taps, D), floats(ring * queue.runs, M, D)
    counters = torch.zeros(1 + 3 * queue.chunks, dtype=torch.int32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden)
    _turns_kernel[(queue.programs,)](
        grad_out, grad_alpha, hidden, kv, query_norm, key_norm, conv, documents, past_values, past_scales, alpha, stats,
        links, scales, slopes, tails, dots, factors, along_v, grad_hidden, grad_kv, tap_sums, gate_sums, counters,
        N, T, past, queue.chunks, queue.lag, queue.later, queue.tickets, 1 / math.sqrt(D),
        M=M, D=D, TAPS=taps, DILATION=dilation, UNROLL=unroll(taps), SQUASH=squash, RESIDUAL=residual,
        BRANCHES=triton.next_power_of_2(M), COLUMNS=triton.next_power_of_2(queue.blocks),
        CHUNK=queue.chunk, RING=queue.ring,
        BLOCK=queue.block, BLOCKS=queue.blocks, TOKENS=queue.tokens, WIDTH=queue.width, RUN=queue.run,
        num_warps=1, **at_most(168),
    )  # fmt: skip
    return grad_hidden, gate_sums, tap_sums
