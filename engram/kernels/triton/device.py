"""Functions that the Triton kernels share."""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import os

import torch
import triton
import triton.language as tl

_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)


@triton.jit
def sigmoid(x):
    """In 4 instructions on NVIDIA's devices, within a few units in the last place of float32; Triton's own takes 12."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "{ mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; add.f32 $0, $0, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, $0; }",
            "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505 -- Triton compiles what follows a return
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def prefetch(at, ROWS: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Into the L2 cache, where there is an instruction for it: WIDTH numbers at `at`, and STRIDE numbers on, ..."""
    if _PTX:
        each: tl.constexpr = 256 // at.dtype.element_ty.primitive_bitwidth  # a sector of 32 bytes
        i = tl.arange(0, triton.next_power_of_2(ROWS * WIDTH // each))
        where = at + (i * each // WIDTH % ROWS) * STRIDE + i * each % WIDTH
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [where.to(tl.int64, bitcast=True)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def prefetch_bulk(at, N: tl.constexpr, there, THREADS: tl.constexpr):
    """Into the L2 cache, by one instruction: N numbers at `at`, if they are `there` (launch.py says for which)."""
    if _PTX:
        first = tl.arange(0, THREADS) == 0
        size = tl.where(first & there, N * at.dtype.element_ty.primitive_bitwidth // 8, 0)
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [(at + tl.arange(0, THREADS) * 0).to(tl.int64, bitcast=True), size],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def sum_each(blocks, N: tl.constexpr):
    """The sums of N blocks of one width: by one reduction, so that warps wait for each other once and not N times."""
    padded: tl.constexpr = triton.next_power_of_2(N)
    parts = blocks
    for _ in tl.static_range(padded - N):
        parts = parts + (tl.zeros_like(blocks[0]),)
    for level in tl.static_range(N):
        if padded >> level > 1:
            pairs = ()
            for i in tl.static_range(padded >> (level + 1)):
                pairs = pairs + (tl.join(parts[2 * i], parts[2 * i + 1]),)
            parts = pairs
    parts = (tl.sum(parts[0], 0),)
    for level in tl.static_range(N):
        if padded >> level > 1:
            halves = ()
            for i in tl.static_range(1 << level):
                halves = halves + tl.split(parts[i])
            parts = halves
    return parts
