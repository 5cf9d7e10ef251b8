"""silu(gate) * up (arXiv:2002.05202, equation 6) in one pass each way, with a weight for each row if wanted."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.kernels.library import define, differentiate
from engram.tensors import widen


def swiglu_reference(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """`swiglu` in plain torch."""
    gate, up = widen(gate_up).chunk(2, dim=-1)
    product = F.silu(gate) * up
    product = product if weights is None else product * widen(weights).unsqueeze(-1)
    return product.to(gate_up.dtype).contiguous()


def swiglu_backward_reference(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of `gate_up` and of `weights` (empty without them), given that of the result."""
    gate, up = widen(gate_up).chunk(2, dim=-1)
    g = widen(grad)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    grad_weights = g.new_empty(0) if weights is None else (g * silu * up).sum(-1).to(weights.dtype).contiguous()
    g = g if weights is None else g * widen(weights).unsqueeze(-1)
    grad_gate_up = torch.cat([g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * silu], dim=-1)
    return grad_gate_up.to(gate_up.dtype).contiguous(), grad_weights


def _backward_fake(grad: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_weights = widen(grad.new_empty(0)) if weights is None else weights.new_empty(weights.shape)
    return gate_up.new_empty(gate_up.shape), grad_weights


_backward_op = define(
    "swiglu_backward(Tensor grad, Tensor gate_up, Tensor? weights) -> (Tensor, Tensor)",
    swiglu_backward_reference,
    _backward_fake,
)
_op = define(
    "swiglu(Tensor gate_up, Tensor? weights) -> Tensor",
    swiglu_reference,
    lambda gate_up, weights: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    gate_up, weights = ctx.saved_tensors
    grad_gate_up, grad_weights = _backward_op(grad, gate_up, weights)
    return grad_gate_up, None if weights is None else grad_weights


differentiate("swiglu", _backward, _setup)


def swiglu(gate_up: Tensor, weights: Tensor | None = None) -> Tensor:
    """`[..., 2F]` (gate first), and a weight for each row `[...]` -> silu(gate) * up * weight, `[..., F]`.

    Computed in float32 (float64 for float64), returned in the type of `gate_up`.
    """
    return _op(gate_up, weights)
