"""`cross_entropy_` for CUDA, in Triton (reference: engram/kernels/loss.py).

A program takes a row of logits in chunks, of which its registers hold the first: the others are read twice, the last of
them first, so that the second time they come from a cache. In numbers of the logits' type 2 V must move.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.loss import cross_entropy_reference_
from engram.kernels.triton.launch import ceil_div, machine

_LOG2_E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(-1e38)  # finite, so that it can be taken from itself
_DEEP = 4  # 16-byte loads of a thread that are under way together
_HELD = 16384  # logits that a program of at most 16 warps holds, two to a processor


@triton.jit
def _chunk(row, v, V: tl.constexpr, EVEN: tl.constexpr):
    """Logits in units of log 2."""
    there = tl.full(v.shape, True, tl.int1) if EVEN else v < V
    return tl.load(row + v, mask=there, other=-float("inf")).to(tl.float32) * _LOG2_E


@triton.jit
def _write(row, v, x, log_sum, target, V: tl.constexpr, EVEN: tl.constexpr):
    there = tl.full(v.shape, True, tl.int1) if EVEN else v < V
    p = tl.exp2(x - log_sum)
    tl.store(row + v, tl.where(v == target, p - 1.0, p).to(row.dtype.element_ty), mask=there)


@triton.jit
def _kernel(
    logits, targets, losses, stride, V: tl.constexpr, DEEP: tl.constexpr, WIDTH: tl.constexpr, CHUNKS: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    target = tl.load(targets + n).to(tl.int32)
    wanted = tl.load(row + target).to(tl.float32)
    even: tl.constexpr = V % (DEEP * WIDTH) == 0
    # Maxima and sums stay apart for each of WIDTH places until all chunks have been seen.
    v = tl.arange(0, DEEP)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    held = _chunk(row, v, V, even)
    top = tl.maximum(tl.max(held, 0), _LOWEST)
    total = tl.sum(tl.exp2(held - top[None, :]), 0)
    for i in range(1, CHUNKS):
        x = _chunk(row, i * (DEEP * WIDTH) + v, V, even)
        more = tl.maximum(tl.max(x, 0), top)
        total = total * tl.exp2(top - more) + tl.sum(tl.exp2(x - more[None, :]), 0)
        top = more
    highest = tl.max(top, 0)
    log_sum = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
    tl.store(losses + n, log_sum / _LOG2_E - wanted)
    for i in range(1, CHUNKS):
        at = (CHUNKS - i) * (DEEP * WIDTH) + v
        _write(row, at, _chunk(row, at, V, even), log_sum, target, V, even)
    _write(row, v, held, log_sum, target, V, even)


def cross_entropy_triton_(logits: Tensor, targets: Tensor) -> Tensor:
    """As `cross_entropy_reference_`; float64, and rows that are not dense, go there."""
    if logits.dtype == torch.float64 or not logits.numel() or logits.stride(1) != 1:
        return cross_entropy_reference_(logits, targets)
    N, V = logits.shape
    warps = _warps(V, logits.element_size(), logits.device)
    width = max(min(triton.next_power_of_2(V) // _DEEP, warps * 32 * 8), 16)
    losses = logits.new_empty(N, dtype=torch.float32)
    _kernel[(N,)](
        logits, targets.contiguous(), losses, logits.stride(0),
        V=V, DEEP=_DEEP, WIDTH=width, CHUNKS=ceil_div(V, _DEEP * width), num_warps=warps,
    )  # fmt: skip
    return losses


def _warps(V: int, element_size: int, device: torch.device) -> int:
    """As few as hold a row; for longer rows as many as let the rows of all programs lie in the L2 cache together."""
    if V <= _HELD:
        return min(max(triton.next_power_of_2(V) // (_DEEP * 32 * 8), 1), 16)
    processors, cache = machine(device)
    warps = 8
    while warps < 32 and 32 // warps * processors * V * element_size > cache:
        warps *= 2
    return warps
