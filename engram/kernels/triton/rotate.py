"""`norm_rotate` and its backward for CUDA, in Triton (references: engram/kernels/norm.py).

A program takes several heads, each as two halves, whose dimensions turn with each other. Forward moves 2 c numbers a
head, backward 3 c (2 c without a norm), and the angles of a token once for its heads, the rest of them from the caches.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.norm import norm_rotate_backward_reference, norm_rotate_reference
from engram.kernels.triton.launch import Rows, at_most
from engram.kernels.triton.parts import sum_parts

_WIDEST = 16384  # channels of a head that a program can hold


@triton.jit
def _halves(
    x, r, R, T, batch_stride, token_stride, head_stride, H: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr
):
    """Both halves of heads r, of which a token has H and a sequence T H."""
    d = tl.arange(0, WIDTH)[None, :]
    token, head = r // H, r % H
    batch, t = token // T, token % T
    start = batch.to(tl.int64) * batch_stride + t.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    at, mask = x + start[:, None] + d, (r < R)[:, None] & (d < HALF)
    return tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)


@triton.jit
def _angles(cos, sin, r, R, T, H: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)[None, :]
    at, mask = ((r // H) % T).to(tl.int64)[:, None] * HALF + d, (r < R)[:, None] & (d < HALF)
    return tl.load(cos + at, mask=mask, other=0.0).to(tl.float32), tl.load(sin + at, mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _weights(weight, HALF: tl.constexpr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)
    first = tl.load(weight + d, mask=d < HALF, other=0.0).to(tl.float32)
    return first[None, :], tl.load(weight + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_halves(out, first, second, r, R, HALF: tl.constexpr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH)[None, :]
    at, mask = out + r.to(tl.int64)[:, None] * (2 * HALF) + d, (r < R)[:, None] & (d < HALF)
    tl.store(at, first.to(out.dtype.element_ty), mask=mask)
    tl.store(at + HALF, second.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "T"])
def _forward_kernel(
    x, weight, cos, sin, out, inverse, R, T, x_batch, x_token, x_head, eps,
    H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, second = _halves(x, r, R, T, x_batch, x_token, x_head, H, HALF, WIDTH)
    turn, lift = _angles(cos, sin, r, R, T, H, HALF, WIDTH)
    first, second = first.to(tl.float32), second.to(tl.float32)
    if weight is not None:
        w1, w2 = _weights(weight, HALF, WIDTH)
        scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + eps)
        tl.store(inverse + r, scale, mask=r < R)
        first *= scale[:, None] * w1
        second *= scale[:, None] * w2
    _store_halves(out, first * turn - second * lift, second * turn + first * lift, r, R, HALF, WIDTH)


@triton.jit(do_not_specialize=["R", "T"])
def _backward_kernel(
    grad, cos, sin, grad_x, R, T, grad_batch, grad_token, grad_head,
    H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Without a norm: turned back."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    g1, g2 = _halves(grad, r, R, T, grad_batch, grad_token, grad_head, H, HALF, WIDTH)
    turn, lift = _angles(cos, sin, r, R, T, H, HALF, WIDTH)
    g1, g2 = g1.to(tl.float32), g2.to(tl.float32)
    _store_halves(grad_x, g1 * turn + g2 * lift, g2 * turn - g1 * lift, r, R, HALF, WIDTH)


@triton.jit(do_not_specialize=["R", "T"])
def _norm_backward_kernel(
    grad, x, weight, cos, sin, inverse, grad_x, parts, R, T,
    grad_batch, grad_token, grad_head, x_batch, x_token, x_head,
    H: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program takes blocks of heads, one for each program apart, and asks for the next before it turns one."""
    w1, w2 = _weights(weight, HALF, WIDTH)
    sums1 = tl.zeros([ROWS, WIDTH], tl.float32)
    sums2 = tl.zeros([ROWS, WIDTH], tl.float32)
    start = tl.program_id(0) * ROWS
    r = start + tl.arange(0, ROWS)
    g1, g2 = _halves(grad, r, R, T, grad_batch, grad_token, grad_head, H, HALF, WIDTH)
    x1, x2 = _halves(x, r, R, T, x_batch, x_token, x_head, H, HALF, WIDTH)
    scale = tl.load(inverse + r, mask=r < R, other=0.0)
    while start < R:  # the interpreter takes no such numbers for a range
        r = start + tl.arange(0, ROWS)
        turn, lift = _angles(cos, sin, r, R, T, H, HALF, WIDTH)
        start += tl.num_programs(0) * ROWS
        next_r = start + tl.arange(0, ROWS)
        next_g = _halves(grad, next_r, R, T, grad_batch, grad_token, grad_head, H, HALF, WIDTH)
        next_x = _halves(x, next_r, R, T, x_batch, x_token, x_head, H, HALF, WIDTH)
        next_scale = tl.load(inverse + next_r, mask=next_r < R, other=0.0)
        scale = scale[:, None]
        n1, n2, g1, g2 = x1.to(tl.float32) * scale, x2.to(tl.float32) * scale, g1.to(tl.float32), g2.to(tl.float32)
        back1, back2 = g1 * turn + g2 * lift, g2 * turn - g1 * lift
        sums1 += back1 * n1
        sums2 += back2 * n2
        back1 *= w1
        back2 *= w2
        along = tl.sum(back1 * n1 + back2 * n2, 1)[:, None] / (2 * HALF)
        _store_halves(grad_x, (back1 - n1 * along) * scale, (back2 - n2 * along) * scale, r, R, HALF, WIDTH)
        g1, g2 = next_g
        x1, x2 = next_x
        scale = next_scale
    d = tl.arange(0, WIDTH)
    into = parts + tl.program_id(0).to(tl.int64) * (2 * HALF) + d
    tl.store(into, tl.sum(sums1, 0), mask=d < HALF)
    tl.store(into + HALF, tl.sum(sums2, 0), mask=d < HALF)


def norm_rotate_triton(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `norm_rotate_reference`; float64 and very wide heads go there."""
    T, H, c = x.shape[1:]
    if x.dtype == torch.float64 or not x.numel() or c > _WIDEST:
        return norm_rotate_reference(x, weight, cos, sin, eps)
    x, strides = _heads(x)
    R, out = x.numel() // c, x.new_empty(x.shape)
    inverse = x.new_empty(0 if weight is None else R, dtype=torch.float32)
    rows = Rows.of(R, c // 2, 8, 4)
    _forward_kernel[(rows.blocks,)](
        x, None if weight is None else weight.contiguous(), cos.contiguous(), sin.contiguous(), out, inverse, R, T,
        *strides, eps, H=H, HALF=c // 2, ROWS=rows.rows, WIDTH=rows.width, num_warps=rows.warps,
    )  # fmt: skip
    return out, inverse


def norm_rotate_backward_triton(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """As `norm_rotate_backward_reference`; float64 and very wide heads go there."""
    T, H, c = x.shape[1:]
    if x.dtype == torch.float64 or not x.numel() or c > _WIDEST:
        return norm_rotate_backward_reference(grad, x, weight, cos, sin, inverse)
    (grad, grad_strides), cos, sin = _heads(grad), cos.contiguous(), sin.contiguous()
    R, grad_x = x.numel() // c, x.new_empty(x.shape)
    rows = Rows.of(R, c // 2, 8, 4)
    if weight is None:
        _backward_kernel[(rows.blocks,)](
            grad, cos, sin, grad_x, R, T, *grad_strides,
            H=H, HALF=c // 2, ROWS=rows.rows, WIDTH=rows.width, num_warps=rows.warps,
        )  # fmt: skip
        return grad_x, x.new_empty(0, dtype=torch.float32)
    x, x_strides = _heads(x)
    programs = rows.resident(x.device)
    parts = x.new_empty(programs, c, dtype=torch.float32)
    _norm_backward_kernel[(programs,)](
        grad, x, weight.contiguous(), cos, sin, inverse, grad_x, parts, R, T, *grad_strides, *x_strides,
        H=H, HALF=c // 2, ROWS=rows.rows, WIDTH=rows.width, num_warps=rows.warps, **at_most(rows.registers),
    )  # fmt: skip
    return grad_x, sum_parts(parts, weight)


def _heads(x: Tensor) -> tuple[Tensor, list[int]]:
    """`x`, copied only if its heads are not dense, and how far sequences, tokens and heads lie apart."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return x, [step if size > 1 else 0 for size, step in zip(x.shape[:3], x.stride()[:3], strict=True)]
