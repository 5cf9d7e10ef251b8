"""`hash_ngrams` for CUDA, and `hash_gather`, which reads the rows it finds in the same pass, in Triton.

References: engram/kernels/hashing.py and gather.py. For a token, hash_gather moves its id, H row numbers of 8 bytes,
and H rows of W numbers, read (in atoms of 64 bytes, wherever they lie: rows.py) and written: all that must move. With
H = 16 and bfloat16 an H100 80GB reached 70 % of its copy rate at W = 80 (77 % in atoms), and 91 % at W = 128.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.launch import ceil_div, dense
from engram.kernels.triton.rows import ASSERTING, as_integers, copy_rows, rows_at_once


@triton.jit(do_not_specialize=["T", "blocks", "past", "pad_id", "eos_id", "n_ids", "R"])
def _hash_kernel(
    ids, documents, moduli, offsets, multipliers, orders, table, rows, gathered,
    T, blocks, past, pad_id, eos_id, n_ids, R,
    H: tl.constexpr, HEADS: tl.constexpr, REACH: tl.constexpr, W: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Rows of a block of a sequence's tokens and, given a table, what they hold."""
    sequence = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.program_id(0) % blocks * TOKENS
    t = start + tl.arange(0, TOKENS)
    h = tl.arange(0, COLUMNS)
    valid, h_in = t < T, h < H
    n = sequence * T + t
    now = sequence * (past + T) + past + t
    order = tl.load(orders + h // HEADS, mask=h_in, other=0)
    same = valid
    mix = tl.zeros([TOKENS], tl.int64)
    at_order = tl.zeros([TOKENS, COLUMNS], tl.int64)
    known = tl.full([TOKENS], True, tl.int1)
    for back in tl.static_range(REACH):
        same = same & (t + past >= back)
        there = tl.load(ids + now - back, mask=same, other=0)
        known = known & (there.to(tl.uint64) < n_ids.to(tl.uint64))  # below zero is above all
        if back > 0:
            if documents is not None:
                document = tl.load(documents + now, mask=valid, other=0)
                same = same & (tl.load(documents + now - back, mask=same, other=0) == document)
            same = same & ((there != eos_id) | (eos_id < 0)).to(tl.int1)
        mix = mix ^ (tl.where(same, there, pad_id) * tl.load(multipliers + back))
        at_order = tl.where((order == back + 1)[None, :], mix[:, None], at_order)
    modulus = tl.load(moduli + h, mask=h_in, other=1)
    row = at_order % modulus[None, :] + tl.load(offsets + h, mask=h_in, other=0)[None, :]
    cell = n[:, None] * H + h[None, :]
    both = valid[:, None] & h_in[None, :]
    tl.store(rows + cell, row, mask=both)
    # Last, and once: whatever is asked for after an assertion waits for what it looks at. Laid out as rows are: in
    # a layout of its own, one number a token, ids would be loaded once more.
    tl.device_assert(known[:, None] | ~both, "a token id beyond the vocabulary")
    if table is not None:
        # Read back what was just stored: a row's number, a slow 64-bit remainder, would else be computed by every
        # thread that copies a part of the row.
        tl.debug_barrier()
        first = (sequence * T + start) * H
        end = tl.minimum(first + TOKENS * H, (sequence + 1) * T * H)
        for _ in range(0, TOKENS * H, ROWS):
            for w0 in range(0, W, WIDTH):
                copy_rows(table, rows, gathered, first, end, w0, R, W, ROWS, WIDTH)
            first += ROWS


@functools.lru_cache(maxsize=256)
def _constants(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A few integers on the device, copied there once."""
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _hash(
    ids: Tensor,
    documents: Tensor | None,
    moduli: Tensor,
    offsets: Tensor,
    ordinal: int,
    multipliers: list[int],
    orders: list[int],
    past: int,
    pad_id: int,
    eos_id: int,
    n_ids: int,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    (B, S), H = ids.shape, moduli.shape[1]
    T = S - past
    rows = ids.new_empty(B, T, H)
    gathered = ids.new_empty(0) if table is None else table.new_empty(B, T, H, table.shape[1])
    if not rows.numel():
        return rows, gathered
    columns = triton.next_power_of_2(H)
    tokens, warps, R, W, count, width = max(128 // columns, 1), 4, 0, 0, 1, 1
    if table is not None:
        cells, copies = as_integers(table.contiguous()), as_integers(gathered)
        tokens, warps, (R, W) = max(32 // columns, 1), 1, cells.shape
        count, width = rows_at_once(W, cells.itemsize)
        count = min(count, tokens * columns)
    blocks = ceil_div(T, tokens)
    _hash_kernel[(B * blocks,)](
        ids.contiguous(), dense(documents), moduli[ordinal].contiguous(), offsets[ordinal].contiguous(),
        _constants(tuple(multipliers), ids.device), _constants(tuple(orders), ids.device),
        None if table is None else cells, rows, None if table is None else copies,
        T, blocks, past, pad_id, eos_id, n_ids, R,
        H=H, HEADS=H // len(orders), REACH=max(orders), W=W, TOKENS=tokens, COLUMNS=columns, ROWS=count, WIDTH=width,
        num_warps=warps, **ASSERTING,
    )  # fmt: skip
    return rows, gathered


def hash_ngrams_triton(*arguments: Any) -> Tensor:
    """As `hash_ngrams_reference`, with its arguments."""
    return _hash(*arguments)[0]


def hash_gather_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    """As `hash_gather_reference`: the arguments of `hash_ngrams`, then the table."""
    return _hash(*arguments)
