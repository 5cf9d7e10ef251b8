"""`swiglu` and its backward for CUDA, in Triton (reference: engram/kernels/swiglu.py).

For a row of F results: forward moves 3 F numbers, backward 5 F (gate, up and the gradient in, two gradients out), and
one weight or its gradient: all that must move.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.swiglu import swiglu_backward_reference, swiglu_reference
from engram.kernels.triton.device import sigmoid
from engram.kernels.triton.launch import ceil_div

_BLOCK = 2048


@triton.jit(do_not_specialize=["P"])
def _forward_kernel(
    gate_up, weights, out, P, F: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    f = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (p < P)[:, None] & (f < F)[None, :]
    at = p[:, None] * (2 * F) + f[None, :]
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + F, mask=mask, other=0.0).to(tl.float32)
    product = gate * sigmoid(gate) * up
    if WEIGHTED:
        product *= tl.load(weights + p, mask=p < P, other=0.0).to(tl.float32)[:, None]
    tl.store(out + p[:, None] * F + f[None, :], product.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["P"])
def _backward_kernel(
    grad,
    gate_up,
    weights,
    grad_gate_up,
    grad_weights,
    hidden,
    P,
    F: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    weight = tl.full([ROWS, 1], 1.0, tl.float32)
    if WEIGHTED:
        weight = tl.load(weights + p, mask=p < P, other=0.0).to(tl.float32)[:, None]
    by_weight = tl.zeros([ROWS, WIDTH], tl.float32)
    for f0 in range(0, F, WIDTH):
        f = f0 + tl.arange(0, WIDTH)
        mask = (p < P)[:, None] & (f < F)[None, :]
        at = p[:, None] * (2 * F) + f[None, :]
        gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_up + at + F, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + p[:, None] * F + f[None, :], mask=mask, other=0.0).to(tl.float32)
        part = sigmoid(gate)
        silu = gate * part
        by_weight += g * silu * up
        grad_gate = g * weight * up * part * (1.0 + gate * (1.0 - part))
        tl.store(grad_gate_up + at, grad_gate.to(grad_gate_up.dtype.element_ty), mask=mask)
        tl.store(grad_gate_up + at + F, (g * weight * silu).to(grad_gate_up.dtype.element_ty), mask=mask)
        if hidden is not None:
            result = silu * up * weight
            tl.store(hidden + p[:, None] * F + f[None, :], result.to(hidden.dtype.element_ty), mask=mask)
    if WEIGHTED:
        tl.store(grad_weights + p, tl.sum(by_weight, 1).to(grad_weights.dtype.element_ty), mask=p < P)


def swiglu_triton(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """As `swiglu_reference`; float64 goes there."""
    if gate_up.dtype == torch.float64:
        return swiglu_reference(gate_up, weights)
    F = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], F)
    if out.numel():
        P, width = out.numel() // F, min(triton.next_power_of_2(F), 256)
        rows = _BLOCK // width
        gate_up = gate_up.contiguous()
        by_row = gate_up if weights is None else weights.contiguous()  # a pointer is wanted, if not read
        _forward_kernel[(ceil_div(P, rows), ceil_div(F, width))](
            gate_up, by_row, out, P, F=F, WEIGHTED=weights is not None, ROWS=rows, WIDTH=width, num_warps=8
        )
    return out


def swiglu_backward_triton(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `swiglu_backward_reference`; float64 goes there."""
    if gate_up.dtype == torch.float64:
        return swiglu_backward_reference(grad, gate_up, weights)
    return _backward(grad, gate_up, weights, None)


def swiglu_again_triton(grad: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `swiglu_backward_triton`, of no float64, and what `swiglu_triton` made of `gate_up`, in the same pass."""
    hidden = torch.empty_like(grad, memory_format=torch.contiguous_format)
    return *_backward(grad, gate_up, weights, hidden), hidden


def _backward(grad: Tensor, gate_up: Tensor, weights: Tensor | None, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    F = gate_up.shape[-1] // 2
    gate_up = gate_up.contiguous()
    by_row = gate_up.new_empty(0, dtype=torch.float32) if weights is None else weights.contiguous()
    grad_gate_up, grad_weights = torch.empty_like(gate_up), torch.empty_like(by_row)
    if gate_up.numel():
        P, width = gate_up.numel() // (2 * F), min(triton.next_power_of_2(F), 256)
        rows = max(_BLOCK // width // 2, 1)
        _backward_kernel[(ceil_div(P, rows),)](
            grad.contiguous(),
            gate_up,
            by_row,
            grad_gate_up,
            grad_weights,
            hidden,
            P,
            F=F,
            WEIGHTED=weights is not None,
            ROWS=rows,
            WIDTH=width,
            num_warps=4,
        )
    return grad_gate_up, grad_weights
