"""Tokens copied to K rows each, and K rows summed for each token, for CUDA, in Triton: one the adjoint of the other.

Both go by token. So a token's row is read once for all its copies, where a gather of rows in their own order would read
it K times: K + 1 rows are moved for a token each way, all that must move.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.launch import ceil_div

_BLOCK = 1024  # numbers of a program, in 16 bytes for each of its threads in bfloat16


@triton.jit(do_not_specialize=["N"])
def _spread_kernel(x, place, rows, N, K: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (n < N)[:, None] & (d < D)[None, :]
    held = tl.load(x + n[:, None] * D + d[None, :], mask=mask, other=0.0)
    for k in tl.range(K, loop_unroll_factor=8):
        row = tl.load(place + n * K + k, mask=n < N, other=0)
        tl.store(rows + row[:, None] * D + d[None, :], held, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _sum_kernel(rows, place, out, N, K: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (n < N)[:, None] & (d < D)[None, :]
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for k in tl.range(K, loop_unroll_factor=8):
        row = tl.load(place + n * K + k, mask=n < N, other=0)
        total += tl.load(rows + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + n[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=mask)


def _blocks(N: int, D: int) -> tuple[tuple[int, int], int, int]:
    """The grid, and tokens and channels of a program."""
    width = min(triton.next_power_of_2(D), _BLOCK)
    tokens = _BLOCK // width
    return (ceil_div(N, tokens), ceil_div(D, width)), tokens, width


def spread_triton(x: Tensor, place: Tensor) -> Tensor:
    """Tokens `[N, D]` -> `[N * K, D]`, token n in rows place[n] of `[N, K]`, which names each row once."""
    (N, D), K = x.shape, place.shape[1]
    rows = x.new_empty(N * K, D)
    if rows.numel():
        grid, tokens, width = _blocks(N, D)
        _spread_kernel[grid](x.contiguous(), place.contiguous(), rows, N, K=K, D=D, TOKENS=tokens, WIDTH=width)
    return rows


def sum_rows_triton(rows: Tensor, place: Tensor) -> Tensor:
    """Rows `[P, D]` -> for each token the sum over k of rows[place[n, k]], in float32 and in that order, `[N, D]`."""
    (N, K), D = place.shape, rows.shape[1]
    out = rows.new_empty(N, D)
    if out.numel():
        grid, tokens, width = _blocks(N, D)
        _sum_kernel[grid](rows.contiguous(), place.contiguous(), out, N, K=K, D=D, TOKENS=tokens, WIDTH=width)
    return out
