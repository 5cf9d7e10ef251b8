"""`cross_entropy_` for CUDA, in Triton (reference: engram/kernels/loss.py).

A program takes a row of V logits, of which 2 V numbers must move. Up to 16384 it holds them; more it reads twice, in
chunks, the latest of them first when it writes, so that most come from a cache the second time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.loss import cross_entropy_reference_
from engram.kernels.triton.launch import WARPS, at_most, ceil_div, machine
from engram.kernels.triton.rows import ASSERTING

_LOG2_E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(-1e38)  # finite, so that it can be taken from itself
_DEEP = 4  # 16-byte loads of a thread that are under way together
_CACHED = 0.6  # of the L2 cache may be taken by rows that are to be read again


@triton.jit
def _chunk(row, v, V: tl.constexpr, FULL: tl.constexpr):
    there = tl.full(v.shape, True, tl.int1) if FULL else v < V
    return tl.load(row + v, mask=there, other=-float("inf")).to(tl.float32)


@triton.jit
def _added(x, top, total):
    """Maxima, and sums of exponentials below them, one pair for each column of all chunks so far."""
    more = tl.maximum(tl.max(x, 0), top)
    return more, total * tl.exp2((top - more) * _LOG2_E) + tl.sum(tl.exp2((x - more[None, :]) * _LOG2_E), 0)


@triton.jit
def _write(row, v, x, top, log2_total, target, V: tl.constexpr, FULL: tl.constexpr):
    there = tl.full(v.shape, True, tl.int1) if FULL else v < V
    p = tl.exp2((x - top) * _LOG2_E - log2_total)
    tl.store(row + v, tl.where(v == target, p - 1.0, p).to(row.dtype.element_ty), mask=there)


@triton.jit
def _kernel(
    logits, targets, losses, stride, V: tl.constexpr, DEEP: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    target = tl.load(targets + n)
    inside = (target >= 0) & (target < V)
    tl.device_assert(inside, "a target beyond the vocabulary")
    target = tl.where(inside, target, 0).to(tl.int32)
    wanted = tl.load(row + target).to(tl.float32)
    # Columns lie in a thread each: threads need not meet before all chunks have been seen.
    v = tl.arange(0, DEEP)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    last = (CHUNKS - 1) * (DEEP * WIDTH) + v
    even: tl.constexpr = V % (DEEP * WIDTH) == 0
    x = _chunk(row, last, V, even)
    top, total = _added(x, tl.full([WIDTH], _LOWEST, tl.float32), tl.zeros([WIDTH], tl.float32))
    for i in range(CHUNKS - 1):
        top, total = _added(_chunk(row, i * (DEEP * WIDTH) + v, V, True), top, total)
    highest = tl.max(top, 0)
    log2_total = tl.log2(tl.sum(total * tl.exp2((top - highest) * _LOG2_E), 0))
    for i in range(CHUNKS - 1):
        at = (CHUNKS - 2 - i) * (DEEP * WIDTH) + v
        _write(row, at, _chunk(row, at, V, True), highest, log2_total, target, V, True)
    if CHUNKS > 1:
        x = _chunk(row, last, V, even)
    _write(row, last, x, highest, log2_total, target, V, even)
    tl.store(losses + n, log2_total / _LOG2_E + (highest - wanted))


def cross_entropy_triton_(logits: Tensor, targets: Tensor) -> Tensor:
    """As `cross_entropy_reference_`; float64, and rows that are not dense, go there."""
    if logits.dtype == torch.float64 or not logits.numel() or logits.stride(1) != 1:
        return cross_entropy_reference_(logits, targets)
    N, V = logits.shape
    each = 8 if logits.stride(0) % 8 == 0 else 4  # numbers of rows that are not aligned each take a load of their own
    warps = _warps(V, each, logits.element_size(), logits.device)
    width = max(min(triton.next_power_of_2(V) // _DEEP, warps * 32 * each), 16)
    losses = logits.new_empty(N, dtype=torch.float32)
    _kernel[(N,)](
        logits, targets.contiguous(), losses, logits.stride(0),
        V=V, DEEP=_DEEP, WIDTH=width, CHUNKS=ceil_div(V, _DEEP * width), num_warps=warps, **at_most(64), **ASSERTING,
    )  # fmt: skip
    return losses


def _warps(V: int, each: int, element_size: int, device: torch.device) -> int:
    """Warps of a program, of which 32 run on a processor: as few as hold a row, or where 16 can't, as few as leave all
    rows that are under way together in a part of the L2 cache."""
    threads = triton.next_power_of_2(V) // (each * _DEEP)
    if threads <= 512:
        return max(threads // 32, 1)
    here = machine(device)
    warps = 8
    while warps < WARPS and 32 // warps * here.processors * V * element_size > _CACHED * here.cache:
        warps *= 2
    return warps
