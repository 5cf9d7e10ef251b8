"""`gather_rows`, `combine_rows` and `row_adam_` for CUDA, in Triton (references: engram/kernels/rows.py).

For W numbers of a bytes, gather_rows moves 8 + 2 a W bytes a row, and row_adam_ 3 a W + 16 W + 16 with two float32
moments of each number, 3 a W + 24 with one of a row: all that must move. But a device's memory moves sectors of 32
bytes, and fetches them in atoms of 64: a row that lies alone costs all atoms that it touches. combine_rows reads each
gradient once and writes each sum once; its sort moves the row numbers a few times.

Of its copy rate an H100 80GB reached, with rows of W = 80 and 128 in bfloat16, counted in those bytes and in atoms:
gather_rows 72 % (80) and 92 % (92), row_adam_ 68 % (75) and 83 % (87), with one moment a row 53 % (72) and 74 % (85).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.rows import combine_rows_reference, gather_rows_reference, row_adam_reference_
from engram.kernels.triton.launch import ceil_div

_AHEAD = 4  # sorted gradients that are asked for at a time
_POWERS = 1024  # steps that a row may have missed for its decay to be looked up
_LARGEST = 2**31 - 1
# Assertions are compiled, as torch's are, but none that looks for overflow.
ASSERTING = {"debug": True, "sanitize_overflow": False}


@triton.jit
def copy_rows(table, rows, out, first, end, w0, R, W: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns w0, ... of out[i] = table[rows[i]] for i = first, ..., but before `end`; all asked for at once."""
    i = first + tl.arange(0, ROWS)
    w = w0 + tl.arange(0, WIDTH)
    row = tl.load(rows + i, mask=i < end, other=0).to(tl.int64)
    inside = (row >= 0) & (row < R)
    tl.device_assert(inside | (i >= end), "a row beyond the table")
    row = tl.where(inside, row, 0)
    mask = (i < end)[:, None] & (w < W)[None, :]
    held = tl.load(table + row[:, None] * W + w[None, :], mask=mask, other=0)
    tl.store(out + i[:, None] * W + w[None, :], held, mask=mask)


def as_integers(x: Tensor) -> Tensor:
    """The same memory in numbers as wide (complex128: half as wide), to be copied as it is, whatever the type."""
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(x.itemsize, torch.int64))


def rows_at_once(W: int, itemsize: int) -> tuple[int, int]:
    """Rows and columns that a warp copies at once: 8 KB, half of its registers."""
    width = min(triton.next_power_of_2(W), 256)
    return 8192 // (width * itemsize), width


@triton.jit(do_not_specialize=["n", "R"])
def _gather_kernel(table, rows, out, n, R, W: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    copy_rows(table, rows, out, tl.program_id(0).to(tl.int64) * ROWS, n, tl.program_id(1) * WIDTH, R, W, ROWS, WIDTH)


def gather_rows_triton(table: Tensor, rows: Tensor) -> Tensor:
    """As `gather_rows_reference`, which takes tables that lie in strides; a row beyond the table fails an assertion."""
    out = table.new_empty(*rows.shape, table.shape[1])
    if not out.numel():
        return out
    if not table.is_contiguous():
        return gather_rows_reference(table, rows)
    cells, copies = as_integers(table), as_integers(out)
    n, (R, W) = rows.numel(), cells.shape
    count, width = rows_at_once(W, cells.itemsize)
    _gather_kernel[(ceil_div(n, count), ceil_div(W, width))](
        cells, rows.contiguous(), copies, n, R, W=W, ROWS=count, WIDTH=width, num_warps=1, **ASSERTING
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


@triton.jit(do_not_specialize=["n", "runs"])
def _place_kernel(counts, keys, found, n, runs, BLOCK: tl.constexpr):
    """counts[r] = how many rows begin in runs 0 to r; and for the host how many there are, and the largest."""
    total = tl.program_id(0).to(tl.int64)
    first = tl.program_id(0)
    while first < runs:
        run = first + tl.arange(0, BLOCK)
        count = tl.load(counts + run, mask=run < runs, other=0)
        tl.store(counts + run, total + tl.cumsum(count, 0), mask=run < runs)
        total += tl.sum(count, 0)
        first += BLOCK
    tl.store(found, total)
    tl.store(found + 1, tl.load(keys + n - 1).to(tl.int64))


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
    heads, tails, keys, begun, sums, n, runs,
    W: tl.constexpr, RUN: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
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
    unique, sums, largest = _combine(keys, grads.contiguous())
    return (unique, sums) if largest < _LARGEST else _combine(rows, grads.contiguous())[:2]


def _run(n: int) -> int:
    """Sorted gradients that one program adds up: long runs leave fewer parts of sums, but need many gradients to fill
    a device."""
    return min(max(triton.next_power_of_2(n // 2048), 16), 64)


def _combine(keys: Tensor, grads: Tensor) -> tuple[Tensor, Tensor, int]:
    """Each row once, and its sum; and the largest row."""
    n, W = grads.shape
    run = _run(n)
    runs = ceil_div(n, run)
    in_order, order = keys.sort(stable=True)
    begun = order.new_empty(runs)
    _count_kernel[(ceil_div(runs, 32),)](in_order, begun, n, RUN=run, RUNS=32, num_warps=4)
    # Written by the device to the host's memory, so that the host learns it while the device goes on to add up.
    found = torch.zeros(2, dtype=torch.int64, pin_memory=keys.is_cuda)
    _place_kernel[(1,)](begun, in_order, found, n, runs, BLOCK=4096, num_warps=16)
    known = torch.cuda.current_stream().record_event() if keys.is_cuda else None
    unique, sums = torch.empty_like(order), torch.empty_like(grads)
    heads, tails = grads.new_empty(2, runs, W, dtype=torch.float32)
    width = min(max(triton.next_power_of_2(W), 16), 128)
    at_once = 256 // width
    _sum_kernel[(ceil_div(runs, at_once), ceil_div(W, width))](
        grads, order, in_order, begun, unique, sums, heads, tails, n,
        W=W, RUN=run, AHEAD=_AHEAD, RUNS=at_once, WIDTH=width, num_warps=1,
    )  # fmt: skip
    if ceil_div(W, 32) * 32 < ceil_div(W, width) * width:
        width = 32  # which leaves fewer columns empty
    _finish_kernel[(runs, ceil_div(W, width))](
        heads, tails, in_order, begun, sums, n, runs,
        W=W, RUN=run, BLOCK=min(8192 // width, 128), WIDTH=width, num_warps=4,
    )  # fmt: skip
    if known is not None:
        known.synchronize()
    n_unique, largest = found.tolist()
    return unique[:n_unique], sums[:n_unique], largest


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


def _pieces(W: int, by_row: bool) -> tuple[int, int, int]:
    """Columns of a piece, rows of a program and its warps.

    Moments of each number begin at any number, so that a thread takes one of them, beside its neighbours' (and some
    128 for a warp). With one moment a row, all else begins where 16 bytes do, and threads take several (some 512).
    """
    if W > 512:
        width = triton.next_power_of_2(ceil_div(W, 16))
        return width, 1, width // 32
    padded = ceil_div(W, 16) * 16
    widest, numbers = (128, 512) if by_row else (32, 128)
    width = min(padded & -padded, widest)  # the largest power of two that divides it
    return width, max(triton.next_power_of_2(numbers // padded), 32 // width, 1), 1


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
    by_row = S - 1 - firsts != W
    width, count, warps = _pieces(W, by_row and not firsts)
    mask = 0xFFFFFFFF
    # No fused multiply-adds: they would round otherwise than the reference, and this kernel waits for memory anyway.
    _adam_kernel[(ceil_div(U, count),)](
        table, row_state, rows.contiguous(), grads.contiguous(),
        _powers(beta1, table.device), _powers(beta2, table.device),
        U, step, lr / (1 - beta1**step), 1 / (1 - beta2**step), 1 - beta1, 1 - beta2, eps,
        math.log2(beta1) if beta1 else -math.inf, math.log2(beta2) if beta2 else -math.inf,
        _scrambled((seed & mask) ^ _scrambled(step & mask)),
        W=W, S=S, FIRSTS=firsts, BY_ROW=by_row, AT_RANDOM=table.dtype == torch.bfloat16, KNOWN=_POWERS,
        ROWS=count, WIDTH=width, num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return None
