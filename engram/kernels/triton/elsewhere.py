"""`pick_rows` for CUDA, in Triton (reference: engram/kernels/elsewhere.py): also from pinned memory of the host.

A program asks for several rows at once. Of those that are cached nothing goes over the bus; the others cross it once
for each time they are read, and the host has no part in it. An H200 read 28 rows in a microsecond, with one to four
programs a processor and whatever they asked for at once, and large products found no processor meanwhile: twelve that
take 58 ms took 87 beside a read of a million rows, 38 ms alone. So a read of the host's memory has few programs, which
take one block of rows after another, and is for few rows; engram/memory/reading.py lets the host gather many.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.launch import ceil_div
from engram.kernels.triton.rows import ASSERTING

_NUMBERS = 1024  # of a program at a time
_PROGRAMS = 16  # beside products: with rows of 160 bytes 256 are on their way, some 9 microseconds' worth


@triton.jit(do_not_specialize=["N", "R"])
def _pick_kernel(cache, slots, table, rows, out, N, R, S: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    w = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    start = tl.program_id(0).to(tl.int64) * ROWS
    while start < N:
        i = start + tl.arange(0, ROWS)
        there = i < N
        row = tl.load(rows + i, mask=there, other=0)
        slot = tl.load(slots + i, mask=there, other=0)
        inside = (row >= 0) & (row < R)
        tl.device_assert(inside | (slot >= 0) | (i >= N), "a row beyond the table")
        mask = there[:, None] & (w < S)[None, :]
        cached = mask & (slot >= 0)[:, None]
        elsewhere = mask & ((slot < 0) & inside)[:, None]
        near = tl.load(cache + slot[:, None] * S + w[None, :], mask=cached, other=0)
        far = tl.load(table + row[:, None] * S + w[None, :], mask=elsewhere, other=0)
        tl.store(out + i[:, None] * S + w[None, :], tl.where(cached, near, far), mask=mask)
        start += tl.num_programs(0) * ROWS


def pick_rows_triton(cache: Tensor, slots: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """As `pick_rows_reference`, with records of bytes."""
    picked = cache.new_empty(*slots.shape, cache.shape[1])
    N, S = slots.numel(), cache.shape[1]
    if not N:
        return picked
    # In the widest numbers that records are made of: a load has one address for each.
    number = torch.int32 if S % 4 == 0 and not (table.data_ptr() | cache.data_ptr()) % 4 else torch.uint8
    parts = [x.contiguous().view(number) for x in (cache, table, picked)]
    S = S // number.itemsize
    width = min(triton.next_power_of_2(S), 256)
    count = max(_NUMBERS // width, 1)
    programs = ceil_div(N, count) if table.is_cuda else min(ceil_div(N, count), _PROGRAMS)
    _pick_kernel[(programs, ceil_div(S, width))](
        parts[0], slots.contiguous(), parts[1], rows.contiguous(), parts[2],
        N, len(table), S=S, ROWS=count, WIDTH=width, num_warps=4, **ASSERTING,
    )  # fmt: skip
    return picked
