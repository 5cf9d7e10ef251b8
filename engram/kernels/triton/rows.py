"""`combine_rows` and `row_adam_` for CUDA, in Triton (references: engram/kernels/rows.py).

row_adam_ reads and writes each row's weights and moments once and reads its gradient once: for W numbers of a bytes and
float32 moments 3 a W + 16 W + 16 bytes a row, or 3 a W + 24 with no first and one second moment.
combine_rows reads each gradient once and writes each sum once; its sort moves the row numbers a few times.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.rows import combine_rows_reference, row_adam_reference_
from engram.kernels.triton.launch import ceil_div

_PIECE = 256  # gradients of a row that one program adds up: a row that half of all tokens read is cut into such pieces
_POWERS = 1024  # steps that a row may have missed for its decay to be looked up


@triton.jit(do_not_specialize=["G"])
def _sum_kernel(
    values, order, starts, lengths, into, sums, G,
    W: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """sums[into[i]] = values[order[starts[i]]] + ... + values[order[starts[i] + lengths[i] - 1]], in that order."""
    i = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    w = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = i < G
    start = tl.load(starts + i, mask=there, other=0)
    length = tl.load(lengths + i, mask=there, other=0)
    longest = tl.max(length, 0)
    total = tl.zeros([GROUPS, WIDTH], tl.float32)
    at = longest * 0
    while at < longest:
        more = at < length
        which = start + at
        if order is not None:
            which = tl.load(order + which, mask=more, other=0)
        mask = more[:, None] & (w < W)[None, :]
        total += tl.load(values + which[:, None] * W + w[None, :], mask=mask, other=0.0).to(tl.float32)
        at += 1
    target = i
    if into is not None:
        target = tl.load(into + i, mask=there, other=0)
    mask = (there & (length > 0))[:, None] & (w < W)[None, :]
    tl.store(sums + target[:, None] * W + w[None, :], total.to(sums.dtype.element_ty), mask=mask)


def _sum_groups(
    values: Tensor, order: Tensor | None, starts: Tensor, lengths: Tensor, into: Tensor | None, sums: Tensor
) -> None:
    G, W = len(starts), values.shape[1]
    width = min(triton.next_power_of_2(W), 256)
    groups = max(512 // width, 1)
    _sum_kernel[(ceil_div(G, groups), ceil_div(W, width))](
        values, order, starts, lengths, into, sums, G, W=W, GROUPS=groups, WIDTH=width, num_warps=4
    )


def combine_rows_triton(rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """As `combine_rows_reference`, but of more than 256 gradients of a row pieces of 256 are summed first."""
    if grads.dtype == torch.float64 or not grads.numel():
        return combine_rows_reference(rows, grads)
    grads = grads.contiguous()
    in_order, order = rows.sort(stable=True)
    unique, counts = in_order.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    sums = grads.new_empty(len(unique), grads.shape[1])
    many = counts > _PIECE
    _sum_groups(grads, order, starts, counts.masked_fill(many, 0), None, sums)
    long = many.nonzero().squeeze(1)
    if len(long):
        pieces = (counts[long] + _PIECE - 1) // _PIECE
        first = pieces.cumsum(0) - pieces
        owner = torch.repeat_interleave(pieces)
        done = (torch.arange(len(owner), device=rows.device) - first[owner]) * _PIECE
        lengths = (counts[long][owner] - done).clamp_max(_PIECE)
        parts = grads.new_empty(len(owner), grads.shape[1], dtype=torch.float32)
        _sum_groups(grads, order, starts[long][owner] + done, lengths, None, parts)
        _sum_groups(parts, None, first, pieces, long, sums)
    return unique, sums


@triton.jit
def _scramble(x):
    """As in the reference, on 32-bit numbers without a sign."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _rounded(x, random):
    """float32 -> the bits of bfloat16, up or down in proportion to what is cut off."""
    bits = x.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    up = tl.where(finite, bits + (random & 0xFFFF), bits) >> 16
    return tl.where(x != x, 0x7FC0, up).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _decay(powers, missed, log2_beta, KNOWN: tl.constexpr):
    """beta ** missed, to the last bit for the steps that most rows miss."""
    known = tl.load(powers + tl.minimum(missed, KNOWN - 1))
    return tl.where(missed < KNOWN, known, tl.exp2(missed.to(tl.float32) * log2_beta))


@triton.jit(do_not_specialize=["U", "step", "key"])
def _adam_kernel(
    table, row_state, rows, grads, powers1, powers2, U, step, rate, unbias, new1, new2, eps,
    log2_beta1, log2_beta2, key,
    W: tl.constexpr, S: tl.constexpr, FIRSTS: tl.constexpr, BY_ROW: tl.constexpr, AT_RANDOM: tl.constexpr,
    KNOWN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = i < U
    row = tl.load(rows + i, mask=there, other=0)
    firsts = row_state + row[:, None] * S
    seconds = firsts + FIRSTS
    last = row_state + row * S + (S - 1)
    missed = step - tl.load(last, mask=there, other=0.0).to(tl.int32)
    tl.store(last, (tl.zeros([ROWS], tl.int32) + step).to(tl.float32), mask=there)
    decay1 = _decay(powers1, missed, log2_beta1, KNOWN)[:, None]
    decay2 = _decay(powers2, missed, log2_beta2, KNOWN)[:, None]
    by_row = tl.zeros([ROWS, 1], tl.float32)
    if BY_ROW:
        squares = tl.zeros([ROWS, WIDTH], tl.float32)
        for w0 in tl.static_range(0, W, WIDTH):
            w = w0 + tl.arange(0, WIDTH)
            g = tl.load(grads + i[:, None] * W + w[None, :], mask=there[:, None] & (w < W)[None, :], other=0.0)
            squares += g.to(tl.float32) * g.to(tl.float32)
        second = tl.load(seconds, mask=there[:, None], other=0.0)
        by_row = second * decay2 + new2 * tl.div_rn(tl.sum(squares, 1), W * 1.0)[:, None]
        tl.store(seconds, by_row, mask=there[:, None])
    for w0 in tl.static_range(0, W, WIDTH):
        w = w0 + tl.arange(0, WIDTH)
        mask = there[:, None] & (w < W)[None, :]
        at = row[:, None] * W + w[None, :]
        g = tl.load(grads + i[:, None] * W + w[None, :], mask=mask, other=0.0).to(tl.float32)
        first = g
        if FIRSTS > 0:
            first = tl.load(firsts + w[None, :], mask=mask, other=0.0) * decay1 + new1 * g
            tl.store(firsts + w[None, :], first, mask=mask)
        if BY_ROW:
            second = by_row
        else:
            second = tl.load(seconds + w[None, :], mask=mask, other=0.0) * decay2 + new2 * (g * g)
            tl.store(seconds + w[None, :], second, mask=mask)
        root = tl.sqrt_rn(tl.div_rn(second, tl.zeros_like(second) + unbias)) + eps
        moved = tl.load(table + at, mask=mask, other=0.0).to(tl.float32)
        moved = moved - tl.div_rn(rate * first, tl.zeros_like(first) + root)
        if AT_RANDOM:
            random = _scramble((row & 0xFFFFFFFF).to(tl.uint32) ^ tl.cast(key, tl.uint32)) ^ (row >> 32).to(tl.uint32)
            random = _scramble(random[:, None] + (w.to(tl.uint32) * 0x9E3779B9)[None, :])
            tl.store(table + at, _rounded(moved, random), mask=mask)
        else:
            tl.store(table + at, moved.to(table.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=16)
def _powers(beta: float, device: torch.device) -> Tensor:
    """beta ** 0, 1, ... in float32, on the device once."""
    return torch.tensor([beta**k for k in range(_POWERS)], dtype=torch.float32, device=device)


def _scrambled(x: int) -> int:
    mask = 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & mask
    x ^= x >> 15
    x = x * 0x846CA68B & mask
    return x ^ x >> 16


def row_adam_triton_(
    table: Tensor,
    row_state: Tensor,
    rows: Tensor,
    grads: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    seed: int,
) -> None:
    """As `row_adam_reference_`; float64 goes there."""
    if table.dtype == torch.float64 or not table.is_contiguous():
        return row_adam_reference_(table, row_state, rows, grads, step, lr, beta1, beta2, eps, seed)
    U, W, S = len(rows), table.shape[1], row_state.shape[1]
    if not U:
        return None
    firsts = W if beta1 else 0
    width = min(triton.next_power_of_2(W), 256)
    count = max(512 // width, 1)
    mask = 0xFFFFFFFF
    # No fused multiply-adds: they would round otherwise than the reference, and this kernel waits for memory anyway.
    _adam_kernel[(ceil_div(U, count),)](
        table, row_state, rows.contiguous(), grads.contiguous(),
        _powers(beta1, table.device), _powers(beta2, table.device),
        U, step, lr / (1 - beta1**step), 1 - beta2**step, 1 - beta1, 1 - beta2, eps,
        math.log2(beta1) if beta1 else 0.0, math.log2(beta2) if beta2 else 0.0,
        _scrambled((seed & mask) ^ _scrambled(step & mask)),
        W=W, S=S, FIRSTS=firsts, BY_ROW=S - 1 - firsts != W, AT_RANDOM=table.dtype == torch.bfloat16, KNOWN=_POWERS,
        ROWS=count, WIDTH=width, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return None
