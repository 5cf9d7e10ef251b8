"""Hyper-connections' operators for CUDA, in Triton (references: engram/kernels/sinkhorn.py).

A program holds the matrices of some tokens, padded to a power of two. Reading and writing branches move what must move
once, but for the gradient of writing, which takes that of the branches M + 1 times, most of them from a cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
# ruff: noqa: RUF005 -- tuples grow by + in kernels; Triton does not unpack them
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.sinkhorn import (
    read_branches_backward_reference,
    read_branches_reference,
    sinkhorn_backward_reference,
    sinkhorn_reference,
    write_branches_backward_reference,
    write_branches_reference,
)
from engram.kernels.triton.launch import ceil_div

_MATRIX_BLOCK, _BLOCK, _WIDTH = 512, 1024, 128
_COLUMNS, _ROWS = tl.constexpr(1), tl.constexpr(2)  # the axis that is summed over, in a block [tokens, M, M]


@triton.jit
def _matrices(pointer, n, valid, M: tl.constexpr, PADDED: tl.constexpr):
    """Where the matrices of tokens n lie, and which of the block's numbers are there."""
    row, column = tl.arange(0, PADDED)[None, :, None], tl.arange(0, PADDED)[None, None, :]
    return pointer + n[:, None, None] * (M * M) + row * M + column, valid[:, None, None] & (row < M) & (column < M)


@triton.jit
def _scaled(logits, n, valid, M: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr):
    """The result, and what each division but the first of the columns divided by; see the reference.

    Padding makes a second block on the diagonal, an identity, which no step changes.
    """
    at, there = _matrices(logits, n, valid, M, PADDED)
    identity = tl.arange(0, PADDED)[None, :, None] == tl.arange(0, PADDED)[None, None, :]
    x = tl.load(at, mask=there, other=0.0).to(tl.float32)
    x = tl.where(there | identity, x, -float("inf"))
    x = x - tl.max(x, _COLUMNS, keep_dims=True)
    most = tl.max(x, _ROWS, keep_dims=True)
    p = tl.exp(x - most) / tl.sum(tl.exp(x), _COLUMNS, keep_dims=True)
    total = tl.sum(p, _ROWS, keep_dims=True)
    p = p / total
    totals = (total * tl.exp(most),)
    for _ in tl.static_range(STEPS - 1):
        by_column = tl.sum(p, _COLUMNS, keep_dims=True)
        p = p / by_column
        by_row = tl.sum(p, _ROWS, keep_dims=True)
        p = p / by_row
        totals = totals + (by_column, by_row)
    return p, totals


@triton.jit(do_not_specialize=["N"])
def _sinkhorn_kernel(logits, out, N, M: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    p, _ = _scaled(logits, n, n < N, M, PADDED, STEPS)
    at, there = _matrices(out, n, n < N, M, PADDED)
    tl.store(at, p.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["N"])
def _sinkhorn_backward_kernel(
    grad, logits, out, N, M: tl.constexpr, PADDED: tl.constexpr, STEPS: tl.constexpr, TOKENS: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    p, totals = _scaled(logits, n, n < N, M, PADDED, STEPS)
    at, there = _matrices(grad, n, n < N, M, PADDED)
    g = tl.load(at, mask=there, other=0.0).to(tl.float32) * p
    for i in tl.static_range(STEPS):
        g = g - p * tl.sum(g, _ROWS, keep_dims=True)
        p = p * totals[2 * (STEPS - 1 - i)]
        g = g - p * tl.sum(g, _COLUMNS, keep_dims=True)
        if i < STEPS - 1:
            p = p * totals[2 * (STEPS - 1 - i) - 1]
    at, there = _matrices(out, n, n < N, M, PADDED)
    tl.store(at, g.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["N"])
def _read_kernel(hidden, weights, out, N, M: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (n < N)[:, None] & (d < D)[None, :]
    x = tl.zeros([TOKENS, WIDTH], tl.float32)
    for m in tl.static_range(M):
        weight = tl.load(weights + n * M + m, mask=n < N, other=0.0).to(tl.float32)
        x += weight[:, None] * tl.load(hidden + (n * M + m)[:, None] * D + d[None, :], mask=mask, other=0.0)
    tl.store(out + n[:, None] * D + d[None, :], x.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _read_backward_kernel(
    grad,
    hidden,
    weights,
    grad_hidden,
    grad_weights,
    N,
    M: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    m = tl.arange(0, PADDED)
    seen = (n < N)[:, None] & (m < M)[None, :]
    weight = tl.load(weights + n[:, None] * M + m[None, :], mask=seen, other=0.0).to(tl.float32)
    along = tl.zeros([TOKENS, PADDED], tl.float32)
    for d0 in range(0, D, WIDTH):
        d = d0 + tl.arange(0, WIDTH)
        g = tl.load(grad + n[:, None] * D + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        g = g.to(tl.float32)[:, None, :]
        at, mask = (n[:, None] * M + m[None, :])[:, :, None] * D + d, seen[:, :, None] & (d < D)
        along += tl.sum(g * tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32), 2)
        tl.store(grad_hidden + at, (weight[:, :, None] * g).to(grad_hidden.dtype.element_ty), mask=mask)
    tl.store(grad_weights + n[:, None] * M + m[None, :], along.to(grad_weights.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["N"])
def _write_kernel(
    hidden,
    update,
    post,
    res,
    out,
    N,
    M: tl.constexpr,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (n < N)[:, None] & (d < D)[None, :]
    branches = ()
    for m in tl.static_range(M):
        h = tl.load(hidden + (n * M + m)[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        branches = branches + (h,)
    u = tl.load(update + n[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        y = tl.load(post + n * M + m, mask=n < N, other=0.0).to(tl.float32)[:, None] * u
        for k in tl.static_range(M):
            share = tl.load(res + (n * M + m) * M + k, mask=n < N, other=0.0).to(tl.float32)
            y += share[:, None] * branches[k]
        tl.store(out + (n * M + m)[:, None] * D + d[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N"])
def _write_backward_kernel(
    grad,
    hidden,
    update,
    post,
    res,
    grad_hidden,
    grad_update,
    grad_post,
    grad_res,
    N,
    M: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """First the update with its weights, then one branch after another with its column of the matrix."""
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    m = tl.arange(0, PADDED)
    seen = (n < N)[:, None] & (m < M)[None, :]
    for k in tl.static_range(M + 1):
        if k == M:
            at_weight, stride = n[:, None] * M + m[None, :], 1
            weight = tl.load(post + at_weight, mask=seen, other=0.0).to(tl.float32)
        else:
            at_weight, stride = (n[:, None] * M + m[None, :]) * M + k, M
            weight = tl.load(res + at_weight, mask=seen, other=0.0).to(tl.float32)
        row = n * stride + (0 if k == M else k)
        along = tl.zeros([TOKENS, PADDED], tl.float32)
        for d0 in range(0, D, WIDTH):
            d = d0 + tl.arange(0, WIDTH)
            at = (n[:, None] * M + m[None, :])[:, :, None] * D + d
            g = tl.load(grad + at, mask=seen[:, :, None] & (d < D), other=0.0).to(tl.float32)
            back = tl.sum(weight[:, :, None] * g, 1)
            at, mask = row[:, None] * D + d[None, :], (n < N)[:, None] & (d < D)[None, :]
            if k == M:
                x = tl.load(update + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(grad_update + at, back.to(grad_update.dtype.element_ty), mask=mask)
            else:
                x = tl.load(hidden + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(grad_hidden + at, back.to(grad_hidden.dtype.element_ty), mask=mask)
            along += tl.sum(g * x[:, None, :], 2)
        if k == M:
            tl.store(grad_post + at_weight, along.to(grad_post.dtype.element_ty), mask=seen)
        else:
            tl.store(grad_res + at_weight, along.to(grad_res.dtype.element_ty), mask=seen)


def sinkhorn_triton(logits: Tensor, steps: int) -> Tensor:
    """As `sinkhorn_reference`; float64 goes there."""
    if logits.dtype == torch.float64:
        return sinkhorn_reference(logits, steps)
    out = logits.new_empty(logits.shape)
    if out.numel():
        N, sizes = _matrix_sizes(logits)
        _sinkhorn_kernel[(ceil_div(N, sizes["TOKENS"]),)](logits.contiguous(), out, N, STEPS=steps, **sizes)
    return out


def sinkhorn_backward_triton(grad: Tensor, logits: Tensor, steps: int) -> Tensor:
    """As `sinkhorn_backward_reference`; float64 goes there."""
    if logits.dtype == torch.float64:
        return sinkhorn_backward_reference(grad, logits, steps)
    out = logits.new_empty(logits.shape)
    if out.numel():
        N, sizes = _matrix_sizes(logits)
        _sinkhorn_backward_kernel[(ceil_div(N, sizes["TOKENS"]),)](
            grad.contiguous(), logits.contiguous(), out, N, STEPS=steps, **sizes
        )
    return out


def _matrix_sizes(logits: Tensor) -> tuple[int, dict[str, int]]:
    M = logits.shape[-1]
    padded = triton.next_power_of_2(M)
    return logits.numel() // (M * M), {"M": M, "PADDED": padded, "TOKENS": max(_MATRIX_BLOCK // padded**2, 1)}


def read_branches_triton(hidden: Tensor, weights: Tensor) -> Tensor:
    """As `read_branches_reference`; float64 goes there."""
    if hidden.dtype == torch.float64:
        return read_branches_reference(hidden, weights)
    M, D = hidden.shape[-2:]
    out = hidden.new_empty(*hidden.shape[:-2], D)
    if out.numel():
        N, tokens, width = _sizes(hidden, 1)
        _read_kernel[(ceil_div(N, tokens), ceil_div(D, width))](
            hidden.contiguous(), weights.contiguous(), out, N, M=M, D=D, TOKENS=tokens, WIDTH=width
        )
    return out


def read_branches_backward_triton(grad: Tensor, hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """As `read_branches_backward_reference`; float64 goes there."""
    if hidden.dtype == torch.float64:
        return read_branches_backward_reference(grad, hidden, weights)
    grads = _new(hidden), _new(weights)
    if hidden.numel():
        M, D = hidden.shape[-2:]
        padded = triton.next_power_of_2(M)
        N, tokens, width = _sizes(hidden, padded)
        _read_backward_kernel[(ceil_div(N, tokens),)](
            grad.contiguous(), hidden.contiguous(), weights.contiguous(), *grads, N,
            M=M, D=D, PADDED=padded, TOKENS=tokens, WIDTH=width,
        )  # fmt: skip
    return grads


def write_branches_triton(hidden: Tensor, update: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """As `write_branches_reference`; float64 goes there."""
    if hidden.dtype == torch.float64:
        return write_branches_reference(hidden, update, post, res)
    out = _new(hidden)
    if out.numel():
        M, D = hidden.shape[-2:]
        N, tokens, width = _sizes(hidden, 1)
        inputs = (x.contiguous() for x in (hidden, update, post, res))
        _write_kernel[(ceil_div(N, tokens), ceil_div(D, width))](*inputs, out, N, M=M, D=D, TOKENS=tokens, WIDTH=width)
    return out


def write_branches_backward_triton(
    grad: Tensor, hidden: Tensor, update: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `write_branches_backward_reference`; float64 goes there."""
    if hidden.dtype == torch.float64:
        return write_branches_backward_reference(grad, hidden, update, post, res)
    grads = _new(hidden), _new(update), _new(post), _new(res)
    if hidden.numel():
        M, D = hidden.shape[-2:]
        padded = triton.next_power_of_2(M)
        N, tokens, width = _sizes(hidden, padded)
        inputs = (x.contiguous() for x in (grad, hidden, update, post, res))
        _write_backward_kernel[(ceil_div(N, tokens),)](
            *inputs, *grads, N, M=M, D=D, PADDED=padded, TOKENS=tokens, WIDTH=width
        )
    return grads


def _sizes(hidden: Tensor, padded: int) -> tuple[int, int, int]:
    """Number of tokens, and a program's block of tokens and channels when it holds `padded` branches at a time."""
    M, D = hidden.shape[-2:]
    width = min(triton.next_power_of_2(D), _WIDTH)
    return hidden.numel() // (M * D), max(_BLOCK // (width * padded), 1), width


def _new(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
