"""Parameters that all tokens share: products of two, and gradients, the sums of what programs leave in parts."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.triton.launch import WARP, ceil_div


@triton.jit(do_not_specialize=["P"])
def _sum_kernel(
    parts, a, b, grad_a, grad_b, P, C: tl.constexpr, A: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """grad_b[c] = sum of parts[p, c]; and where there are factors, this times a[c mod A], and grad_a this times b."""
    c = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    c_in = c < C
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    first = 0
    while first < P:  # the interpreter takes no such numbers for a range
        p = first + tl.arange(0, ROWS)
        at = parts + p.to(tl.int64)[:, None] * C + c[None, :]
        sums += tl.load(at, mask=(p < P)[:, None] & c_in[None, :], other=0.0)
        first += ROWS
    total = tl.sum(sums, 0)
    if a is not None:
        by_a = total * tl.load(b + c, mask=c_in, other=0.0).to(tl.float32)
        tl.store(grad_a + c, by_a.to(grad_a.dtype.element_ty), mask=c_in)
        total *= tl.load(a + c % A, mask=c_in, other=0.0).to(tl.float32)
    tl.store(grad_b + c, total.to(grad_b.dtype.element_ty), mask=c_in)


def _launch(parts: Tensor, a: Tensor | None, b: Tensor | None, grad_a: Tensor | None, grad_b: Tensor) -> None:
    C = grad_b.numel()
    _sum_kernel[(ceil_div(C, WARP),)](
        parts, a, b, grad_a, grad_b, len(parts), C=C, A=1 if a is None else a.numel(), ROWS=128, WIDTH=WARP, num_warps=8
    )


def sum_parts(parts: Tensor, like: Tensor) -> Tensor:
    """float32 parts `[P, ...]` -> their sum `[...]` in the type of `like`."""
    total = torch.empty(parts.shape[1:], dtype=like.dtype, device=parts.device)
    _launch(parts, None, None, None, total)
    return total


def product_gradients(parts: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `a` `[M, D]` and `b` `[..., M, D]`, given those of a b in float32 parts `[P, ..., M, D]`."""
    same, grad_b = a.shape == b.shape, torch.empty_like(b, memory_format=torch.contiguous_format)
    grad_a = torch.empty_like(grad_b, dtype=a.dtype if same else torch.float32)
    _launch(parts, a.contiguous(), b.contiguous(), grad_a, grad_b)
    return grad_a if same else grad_a.flatten(0, -3).sum(0).to(a.dtype), grad_b


@triton.jit(do_not_specialize=["N"])
def _product_kernel(a, b, out, N, B: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(a + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(out + i, x * tl.load(b + i % B, mask=i < N, other=0.0).to(tl.float32), mask=i < N)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a` `[..., M, D]` times `b` `[M, D]` in float32, by one launch whatever their types."""
    out = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    N = out.numel()
    _product_kernel[(ceil_div(N, 512),)](a.contiguous(), b.contiguous(), out, N, B=b.numel(), BLOCK=512, num_warps=4)
    return out
