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

_RUN = 32  # sorted gradients that one program adds up
_AHEAD = 8  # of them asked for at a time
_BLOCK = 32  # parts of a sum that are added up at a time
_POWERS = 1024  # steps that a row may have missed for its decay to be looked up
_LARGEST = 2**31 - 1


@triton.jit
def copy_rows(table, rows, out, first, end, W: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """out[i] = table[rows[i]] for i = first, ..., but before `end`; all is asked for before any is stored."""
    i = first + tl.arange(0, ROWS)
    row = tl.load(rows + i, mask=i < end, other=0)
    held = ()
    for w0 in tl.static_range(0, W, WIDTH):
        w = w0 + tl.arange(0, WIDTH)
        mask = (i < end)[:, None] & (w < W)[None, :]
        held = held + (tl.load(table + row[:, None] * W + w[None, :], mask=mask, other=0),)
    for k in tl.static_range(len(held)):
        w = k * WIDTH + tl.arange(0, WIDTH)
        mask = (i < end)[:, None] & (w < W)[None, :]
        tl.store(out + i[:, None] * W + w[None, :], held[k], mask=mask)


def rows_at_once(W: int) -> tuple[int, int]:
    """Columns of a piece and rows of a step."""
    width = min(triton.next_power_of_2(W), 256)
    return width, max(8192 // (width * ceil_div(W, width)), 1)


@triton.jit(do_not_specialize=["n"])
def _gather_kernel(table, rows, out, n, W: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    copy_rows(table, rows, out, tl.program_id(0).to(tl.int64) * ROWS, n, W, ROWS, WIDTH)


def gather_rows_triton(table: Tensor, rows: Tensor) -> Tensor:
    """As `gather_rows_reference`."""
    n, W = rows.numel(), table.shape[1]
    out = table.new_empty(*rows.shape, W)
    if out.numel():
        width, at_once = rows_at_once(W)
        _gather_kernel[(ceil_div(n, at_once),)](
            table.contiguous(), rows.contiguous(), out, n, W=W, ROWS=at_once, WIDTH=width, num_warps=4
        )
    return out


@triton.jit(do_not_specialize=["n"])
def _narrow_kernel(rows, keys, n, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(keys + i, tl.minimum(tl.load(rows + i, mask=i < n, other=0), LARGEST).to(tl.int32), mask=i < n)


@triton.jit(do_not_specialize=["n"])
def _count_kernel(keys, counts, n, RUN: tl.constexpr, RUNS: tl.constexpr):
    """counts[r] = how many rows begin in run r."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    p = run[:, None] * RUN + tl.arange(0, RUN)[None, :]
    key = tl.load(keys + p, mask=p < n, other=0)
    before = tl.load(keys + p - 1, mask=(p < n) & (p > 0), other=0)
    begins = (p < n) & ((key != before) | (p == 0))
    tl.store(counts + run, tl.sum(begins.to(tl.int64), 1), mask=run * RUN < n)


@triton.jit(do_not_specialize=["n"])
def _sum_kernel(
    values, order, keys, begun, unique, sums, heads, tails, n,
    W: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr, RUNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of each run the sums of rows that begin and end in it, of the row before (`heads`) and of the last (`tails`)."""
    run = tl.program_id(0).to(tl.int64) * RUNS + tl.arange(0, RUNS)
    w = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    p = run * RUN
    place = tl.load(begun + run - 1, mask=(p < n) & (run > 0), other=0) - 1
    start = place
    key = tl.load(keys + p - 1, mask=(p < n) & (p > 0), other=0)
    total = tl.zeros([RUNS, WIDTH], tl.float32)
    head = total
    for _ in range(0, RUN, AHEAD):
        ahead = ()
        for j in tl.static_range(AHEAD):
            which = tl.load(order + p + j, mask=p + j < n, other=0)
            mask = (p + j < n)[:, None] & (w < W)[None, :]
            ahead = ahead + (tl.load(values + which[:, None] * W + w[None, :], mask=mask, other=0.0),)
        for j in tl.static_range(AHEAD):
            before = key
            key = tl.load(keys + p + j, mask=p + j < n, other=0)
            begins = (p + j < n) & ((key != before) | (p + j == 0))
            done = begins & (place > start)
            mask = done[:, None] & (w < W)[None, :]
            tl.store(sums + place[:, None] * W + w[None, :], total.to(sums.dtype.element_ty), mask=mask)
            place += begins.to(tl.int64)
            tl.store(unique + place, key.to(tl.int64), mask=begins & (tl.program_id(1) == 0))
            total = tl.where(begins[:, None], 0.0, total) + ahead[j].to(tl.float32)
            head = tl.where((place == start)[:, None], total, head)
        p += AHEAD
    columns = (w < W)[None, :]
    after = tl.load(keys + p, mask=p < n, other=0)
    done = (p >= n) | (after != key)
    began = place > start
    mask = ((p - RUN < n) & began & done)[:, None] & columns
    tl.store(sums + place[:, None] * W + w[None, :], total.to(sums.dtype.element_ty), mask=mask)
    mask = ((p < n) & began & (after == key))[:, None] & columns
    tl.store(tails + run[:, None] * W + w[None, :], total, mask=mask)
    tl.store(heads + run[:, None] * W + w[None, :], head, mask=(p - RUN < n)[:, None] & columns)


@triton.jit(do_not_specialize=["n", "runs"])
def _finish_kernel(
    heads,
    tails,
    keys,
    begun,
    sums,
    n,
    runs,
    W: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums of rows that begin in one run and end in another."""
    run = tl.program_id(0).to(tl.int64)
    w = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    end = (run + 1) * RUN
    begun_here = tl.load(begun + run)
    before = tl.load(begun + run - 1, mask=run > 0, other=0)
    goes_on = tl.load(keys + end - 1, mask=end < n, other=0) == tl.load(keys + end, mask=end < n, other=1)
    if goes_on & (begun_here > before):
        total = tl.load(tails + run * W + w, mask=w < W, other=0.0)
        first = run + 1
        there = begun_here
        while there == begun_here:
            block = first + tl.arange(0, BLOCK)
            mine = (block < runs) & (tl.load(begun + block - 1, mask=block < runs, other=0) == begun_here)
            mask = mine[:, None] & (w < W)[None, :]
            total += tl.sum(tl.load(heads + block[:, None] * W + w[None, :], mask=mask, other=0.0), 0)
            first += BLOCK
            there = tl.load(begun + first - 1, mask=first < runs, other=0)
        tl.store(sums + (begun_here - 1) * W + w, total.to(sums.dtype.element_ty), mask=w < W)


def combine_rows_triton(rows: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """As `combine_rows_reference`, but a row's gradients are summed in parts, always the same."""
    if grads.dtype == torch.float64 or not grads.numel():
        return combine_rows_reference(rows, grads)
    # Half the bytes to sort by, and half the passes of the radix sort, if row numbers are below 2^31, as is seen later.
    keys = rows.new_empty(rows.shape, dtype=torch.int32)
    _narrow_kernel[(ceil_div(len(rows), 1024),)](rows.contiguous(), keys, len(rows), LARGEST=_LARGEST, BLOCK=1024)
    unique, sums, found = _combine(keys, grads.contiguous())
    n_unique, largest = found.tolist()
    if largest == _LARGEST:
        unique, sums, found = _combine(rows, grads.contiguous())
    return unique[:n_unique], sums[:n_unique]


def _combine(keys: Tensor, grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and sums, with room for as many as there are gradients; how many they are, and the largest row."""
    n, W = grads.shape
    runs = ceil_div(n, _RUN)
    in_order, order = keys.sort(stable=True)
    counts = order.new_empty(runs)
    _count_kernel[(ceil_div(runs, 32),)](in_order, counts, n, RUN=_RUN, RUNS=32, num_warps=4)
    begun = counts.cumsum(0)
    unique, sums = torch.empty_like(order), torch.empty_like(grads)
    heads, tails = grads.new_empty(2, runs, W, dtype=torch.float32)
    width = min(max(triton.next_power_of_2(W), 16), 128)
    at_once = max(256 // width, 1)
    _sum_kernel[(ceil_div(runs, at_once), ceil_div(W, width))](
        grads, order, in_order, begun, unique, sums, heads, tails, n,
        W=W, RUN=_RUN, AHEAD=_AHEAD, RUNS=at_once, WIDTH=width, num_warps=1,
    )  # fmt: skip
    _finish_kernel[(runs, ceil_div(W, width))](
        heads, tails, in_order, begun, sums, n, runs, W=W, RUN=_RUN, BLOCK=_BLOCK, WIDTH=width, num_warps=4
    )
    return unique, sums, torch.stack([begun[-1], in_order[-1].long()])


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
    """All that a block of rows needs is asked for at once, in pieces of its columns, and then moved."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = i < U
    row = tl.load(rows + i, mask=there, other=0)
    firsts = row_state + row[:, None] * S
    seconds = firsts + FIRSTS
    last = row_state + row * S + (S - 1)
    moved_at = tl.load(last, mask=there, other=0.0)
    if BY_ROW:
        by_row = tl.load(seconds, mask=there[:, None], other=0.0)
    gs = ()
    weights = ()
    moments1 = ()
    moments2 = ()
    for w0 in tl.static_range(0, W, WIDTH):
        w = w0 + tl.arange(0, WIDTH)
        mask = there[:, None] & (w < W)[None, :]
        gs = gs + (tl.load(grads + i[:, None] * W + w[None, :], mask=mask, other=0.0),)
        if FIRSTS > 0:
            moments1 = moments1 + (tl.load(firsts + w[None, :], mask=mask, other=0.0),)
        if not BY_ROW:
            moments2 = moments2 + (tl.load(seconds + w[None, :], mask=mask, other=0.0),)
        weights = weights + (tl.load(table + row[:, None] * W + w[None, :], mask=mask, other=0.0),)
    # Nothing may wait for the steps missed, to look up powers, before all is asked for.
    tl.debug_barrier()
    missed = step - moved_at.to(tl.int32)
    decay2 = _decay(powers2, missed, log2_beta2, KNOWN)[:, None]
    if FIRSTS > 0:
        decay1 = _decay(powers1, missed, log2_beta1, KNOWN)[:, None]
    if BY_ROW:
        squares = tl.zeros([ROWS, WIDTH], tl.float32)
        for k in tl.static_range(len(gs)):
            g = gs[k].to(tl.float32)
            squares += g * g
        by_row = by_row * decay2 + new2 * tl.div_rn(tl.sum(squares, 1), W * 1.0)[:, None]
        tl.store(seconds, by_row, mask=there[:, None])
        rate_of_row = tl.div_rn(tl.zeros_like(by_row) + rate, tl.sqrt_rn(by_row * unbias) + eps)
    tl.store(last, (tl.zeros([ROWS], tl.int32) + step).to(tl.float32), mask=there)
    if AT_RANDOM:
        of_row = _scramble((row & 0xFFFFFFFF).to(tl.uint32) ^ tl.cast(key, tl.uint32)) ^ (row >> 32).to(tl.uint32)
    for k in tl.static_range(len(gs)):
        w = k * WIDTH + tl.arange(0, WIDTH)
        mask = there[:, None] & (w < W)[None, :]
        g = gs[k].to(tl.float32)
        first = g
        if FIRSTS > 0:
            first = moments1[k] * decay1 + new1 * g
            tl.store(firsts + w[None, :], first, mask=mask)
        if BY_ROW:
            move = rate_of_row * first
        else:
            second = moments2[k] * decay2 + new2 * (g * g)
            tl.store(seconds + w[None, :], second, mask=mask)
            move = tl.div_rn(rate * first, tl.sqrt_rn(second * unbias) + eps)
        weight = weights[k].to(tl.float32) - move
        at = table + row[:, None] * W + w[None, :]
        if AT_RANDOM:
            random = _scramble(of_row[:, None] + (w.to(tl.uint32) * 0x9E3779B9)[None, :])
            tl.store(at, _rounded(weight, random), mask=mask)
        else:
            tl.store(at, weight.to(table.dtype.element_ty), mask=mask)


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


def _pieces(W: int) -> tuple[int, int, int]:
    """Columns of a piece, rows of a program and its warps: a number for each thread, so that neighbouring threads read
    neighbouring numbers, wherever a row begins."""
    if W <= 512:
        width = 16 if ceil_div(W, 16) % 2 else 32
        return width, 64 // width, 2
    width = triton.next_power_of_2(ceil_div(W, 16))
    return width, 1, width // 32


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
    width, count, warps = _pieces(W)
    mask = 0xFFFFFFFF
    # No fused multiply-adds: they would round otherwise than the reference, and this kernel waits for memory anyway.
    _adam_kernel[(ceil_div(U, count),)](
        table, row_state, rows.contiguous(), grads.contiguous(),
        _powers(beta1, table.device), _powers(beta2, table.device),
        U, step, lr / (1 - beta1**step), 1 / (1 - beta2**step), 1 - beta1, 1 - beta2, eps,
        math.log2(beta1) if beta1 else 0.0, math.log2(beta2) if beta2 else 0.0,
        _scrambled((seed & mask) ^ _scrambled(step & mask)),
        W=W, S=S, FIRSTS=firsts, BY_ROW=S - 1 - firsts != W, AT_RANDOM=table.dtype == torch.bfloat16, KNOWN=_POWERS,
        ROWS=count, WIDTH=width, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return None
