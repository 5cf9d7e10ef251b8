"""All experts on the tokens that chose them, forward and backward in one operator each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from engram.kernels.library import define, differentiate
from engram.kernels.native import load_native
from engram.kernels.swiglu import swiglu_backward_reference
from engram.kernels.triton import register as load_triton
from engram.tensors import widen

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]
_AMX = torch.cpu._is_amx_tile_supported()


def has_grouped_swiglu(device: str, dtype: torch.dtype, D: int, width: int) -> bool:
    """Whether a type of device has a kernel for `grouped_swiglu` in a type and these widths that is faster than
    products of groups.

    On the CPU, where the processor has AMX tiles, oneDNN multiplies bfloat16 several times as fast as our vectors
    would. On CUDA the products are torch's, in bfloat16, of rows that are multiples of 16 bytes.
    """
    if device == "cuda":
        return dtype == torch.bfloat16 and D % 8 == width % 8 == 0 and load_triton()
    if device != "cpu" or dtype not in (torch.float32, torch.float64, torch.bfloat16) or not load_native():
        return False
    return dtype != torch.bfloat16 or not _AMX


def _groups(copy: Tensor, ends: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Each expert that has rows, which they are, and their copies' numbers."""
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        if end > begin:
            yield expert, slice(begin, end), copy[begin:end]
        begin = end


def grouped_swiglu_reference(
    x: Tensor, weights: Tensor, place: Tensor, copy: Tensor, ends: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor]:
    """`grouped_swiglu` in plain torch; what is returned second is kept for the backward pass."""
    K = place.shape[1]
    gate_up = x.new_empty(len(copy), w_gate_up.shape[2])
    out = widen(x).new_zeros(x.shape)
    for expert, rows, copies in _groups(copy, ends):
        token = copies // K
        gate_up[rows] = x[token] @ w_gate_up[expert].to(x.dtype)
        gate, up = widen(gate_up[rows]).chunk(2, dim=-1)
        hidden = F.silu(gate) * up * widen(weights.flatten()[copies]).unsqueeze(-1)
        out.index_add_(0, token, hidden @ widen(w_down[expert].to(x.dtype)))
    return out.to(x.dtype), gate_up


def grouped_swiglu_backward_reference(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    place: Tensor,
    copy: Tensor,
    ends: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    gate_up: Tensor,
) -> Gradients:
    """Gradients of tokens, weights and both matrices."""
    K = place.shape[1]
    grad_x, grad_weights = widen(x).new_zeros(x.shape), widen(weights).new_zeros(weights.numel())
    grad_gate_up, grad_down = w_gate_up.new_zeros(w_gate_up.shape), w_down.new_zeros(w_down.shape)
    for expert, rows, copies in _groups(copy, ends):
        token, weight = copies // K, widen(weights.flatten()[copies])
        back = widen(grad[token])
        inner, of_weight = swiglu_backward_reference(back @ widen(w_down[expert]).mT, widen(gate_up[rows]), weight)
        grad_weights[copies] = of_weight
        grad_x.index_add_(0, token, inner @ widen(w_gate_up[expert]).mT)
        gate, up = widen(gate_up[rows]).chunk(2, dim=-1)
        grad_down[expert] = ((F.silu(gate) * up * weight.unsqueeze(-1)).mT @ back).to(w_down.dtype)
        grad_gate_up[expert] = (widen(x[token]).mT @ inner).to(w_gate_up.dtype)
    return grad_x.to(x.dtype), grad_weights.view_as(weights).to(weights.dtype), grad_gate_up, grad_down


_op = define(
    "grouped_swiglu(Tensor x, Tensor weights, Tensor place, Tensor copy, Tensor ends, Tensor w_gate_up, Tensor w_down) "
    "-> (Tensor, Tensor)",
    grouped_swiglu_reference,
    lambda x, weights, place, copy, ends, w_gate_up, w_down: (
        x.new_empty(x.shape),
        x.new_empty(copy.shape[0], w_gate_up.shape[2]),
    ),
)
_backward_op = define(
    "grouped_swiglu_backward(Tensor grad, Tensor x, Tensor weights, Tensor place, Tensor copy, Tensor ends, "
    "Tensor w_gate_up, Tensor w_down, Tensor gate_up) -> (Tensor, Tensor, Tensor, Tensor)",
    grouped_swiglu_backward_reference,
    lambda grad, x, weights, place, copy, ends, w_gate_up, w_down, gate_up: tuple(
        one.new_empty(one.shape) for one in (x, weights, w_gate_up, w_down)
    ),
)


def _flops(x: Any, weights: Any, place: Any, copy: Any, ends: Any, w_gate_up: Any, *rest: Any, **others: Any) -> int:
    """Of the three products."""
    (_, D, two_F), (N, K) = w_gate_up, place
    return 3 * N * K * D * two_F


def _backward_flops(grad: Any, *inputs: Any, **others: Any) -> int:
    return 2 * _flops(*inputs)


register_flop_formula(torch.ops.engram.grouped_swiglu)(_flops)
register_flop_formula(torch.ops.engram.grouped_swiglu_backward)(_backward_flops)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of that: zeros as large as all hidden layers
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    grad_x, grad_weights, grad_gate_up, grad_down = _backward_op(grad, *ctx.saved_tensors)
    return grad_x, grad_weights, None, None, None, grad_gate_up, grad_down


differentiate("grouped_swiglu", _backward, _setup)


def grouped_swiglu(
    x: Tensor, weights: Tensor, place: Tensor, copy: Tensor, ends: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> Tensor:
    """sum_k weight_k * down_e(silu(gate_e x) * (up_e x)) over each token's K experts e, `[N, D]` in the type of `x`.

    Args:
        x: tokens `[N, D]`, in the type to multiply in; sums are float32 (float64 for float64).
        weights: of each token's copies, `[N, K]`.
        place, copy, ends: where copies stand among rows ordered by expert, from `lay_out_rows` without padding.
        w_gate_up: `[E, D, 2F]`, gate first. w_down: `[E, F, D]`. In the type of `x` or in float32, as their gradients.
    """
    return _op(x, weights, place, copy, ends, w_gate_up, w_down)[0]
