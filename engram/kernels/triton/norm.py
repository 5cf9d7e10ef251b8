"""`rms_norm` and its backward for CUDA, in Triton (references: engram/kernels/norm.py).

Rows lie in registers from their one reading to their one writing: forward moves 2 D numbers a row, backward 3 D. In the
backward a program keeps the weight's gradient of all its rows; programs' parts, D float32 each, are summed afterwards.
Where a block of twice a power of two would be mostly padding, the backward takes a row in two, the second a small one.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.norm import rms_norm_backward_reference, rms_norm_reference
from engram.kernels.triton.launch import Rows, at_most
from engram.kernels.triton.parts import sum_parts

_WIDEST = 16384  # channels that a program can hold


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    x, weight, out, inverse, R, x_stride, eps, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, WIDTH)
    mask = (r < R)[:, None] & (d < D)[None, :]
    wide_r = r.to(tl.int64)[:, None]
    value = tl.load(x + wide_r * x_stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / D + eps)
    y = value * scale[:, None] * w[None, :]
    tl.store(out + wide_r * D + d[None, :], y.to(out.dtype.element_ty), mask=mask)
    tl.store(inverse + r, scale, mask=r < R)


@triton.jit
def _columns(part: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr):
    return part * FIRST + tl.arange(0, REST if part else FIRST)


@triton.jit
def _rows_from(
    first, grad, x, inverse, R, grad_stride, x_stride,
    D: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """What the backward reads of ROWS rows, in one block or two, and their scales."""
    r = first + tl.arange(0, ROWS)
    wide_r = r.to(tl.int64)[:, None]
    gs = ()
    values = ()
    for part in tl.static_range(2 if REST else 1):
        d = _columns(part, FIRST, REST)
        mask = (r < R)[:, None] & (d < D)[None, :]
        gs = gs + (tl.load(grad + wide_r * grad_stride + d[None, :], mask=mask, other=0.0),)
        values = values + (tl.load(x + wide_r * x_stride + d[None, :], mask=mask, other=0.0),)
    return gs, values, tl.load(inverse + r, mask=r < R, other=0.0)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(
    grad, x, weight, inverse, grad_x, parts, R, grad_stride, x_stride,
    D: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """A program takes blocks of rows, one for each program apart, and asks for the next before it computes with one."""
    PARTS: tl.constexpr = 2 if REST else 1
    ws = ()
    sums = ()
    for part in tl.static_range(PARTS):
        d = _columns(part, FIRST, REST)
        ws = ws + (tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :],)
        sums = sums + (tl.zeros([ROWS, REST if part else FIRST], tl.float32),)
    first = tl.program_id(0) * ROWS
    gs, values, scale = _rows_from(first, grad, x, inverse, R, grad_stride, x_stride, D, ROWS, FIRST, REST)
    while first < R:  # the interpreter takes no such numbers for a range
        r = first + tl.arange(0, ROWS)
        first += tl.num_programs(0) * ROWS
        following = _rows_from(first, grad, x, inverse, R, grad_stride, x_stride, D, ROWS, FIRST, REST)
        scale = scale[:, None]
        along = tl.zeros([ROWS], tl.float32)
        ns = ()
        weighted = ()
        more = ()
        for part in tl.static_range(PARTS):
            n, g = values[part].to(tl.float32) * scale, gs[part].to(tl.float32)
            more = more + (sums[part] + g * n,)
            g *= ws[part]
            along += tl.sum(g * n, 1)
            ns = ns + (n,)
            weighted = weighted + (g,)
        sums = more
        along = along[:, None] / D
        for part in tl.static_range(PARTS):
            d = _columns(part, FIRST, REST)
            into = grad_x + r.to(tl.int64)[:, None] * D + d[None, :]
            back = ((weighted[part] - ns[part] * along) * scale).to(grad_x.dtype.element_ty)
            tl.store(into, back, mask=(r < R)[:, None] & (d < D)[None, :])
        gs, values, scale = following
    for part in tl.static_range(PARTS):
        d = _columns(part, FIRST, REST)
        tl.store(parts + tl.program_id(0).to(tl.int64) * D + d, tl.sum(sums[part], 0), mask=d < D)


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm_reference`; float64 and very wide rows go there."""
    D = x.shape[-1]
    if x.dtype == torch.float64 or not x.numel() or D > _WIDEST:
        return rms_norm_reference(x, weight, eps)
    x, stride = _rows(x)
    R = x.numel() // D
    out, inverse = x.new_empty(x.shape), x.new_empty(R, dtype=torch.float32)
    rows = Rows.of(R, D, 32, 4)
    _forward_kernel[(rows.blocks,)](
        x, weight.contiguous(), out, inverse, R, stride, eps,
        D=D, ROWS=rows.rows, WIDTH=rows.width, num_warps=rows.warps,
    )  # fmt: skip
    return out, inverse


def rms_norm_backward_triton(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """As `rms_norm_backward_reference`; float64 and very wide rows go there."""
    D = x.shape[-1]
    if x.dtype == torch.float64 or not x.numel() or D > _WIDEST:
        return rms_norm_backward_reference(grad, x, weight, inverse)
    (grad, grad_stride), (x, x_stride) = _rows(grad), _rows(x)
    R, grad_x = x.numel() // D, x.new_empty(x.shape)
    rows = Rows.in_two(R, D, 16) or Rows.of(R, D, 16, 8)
    programs = rows.resident(x.device)
    parts = x.new_empty(programs, D, dtype=torch.float32)
    _backward_kernel[(programs,)](
        grad, x, weight.contiguous(), inverse, grad_x, parts, R, grad_stride, x_stride,
        D=D, ROWS=rows.rows, FIRST=rows.width, REST=rows.rest, num_warps=rows.warps, **at_most(rows.registers),
    )  # fmt: skip
    return grad_x, sum_parts(parts, weight)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """`x` and how far its rows lie apart, copied only if they are not dense or lie at irregular distances."""
    axes = [(size, step) for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    even = all(step == size * inner for (_, step), (size, inner) in itertools.pairwise(axes))
    if not even or (x.stride(-1) != 1 and x.shape[-1] > 1):
        return x.contiguous(), x.shape[-1]
    return x, axes[-1][1] if axes else x.shape[-1]
