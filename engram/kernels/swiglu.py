"""silu(gate) * up * weight for the rows of a grouped product, in one pass each way (arXiv:2002.05202, equation 6)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.kernels.library import LIBRARY, define
from engram.tensors import widen


def weighted_swiglu_reference(gate_up: Tensor, weights: Tensor) -> Tensor:
    """`weighted_swiglu` in plain torch."""
    gate, up = widen(gate_up).chunk(2, dim=-1)
    return (F.silu(gate) * up * widen(weights).unsqueeze(-1)).to(gate_up.dtype)


def weighted_swiglu_backward_reference(grad: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate_up` and of `weights`, given that of the result."""
    gate, up = widen(gate_up).chunk(2, dim=-1)
    g, w = widen(grad), widen(weights).unsqueeze(-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    grad_gate = g * w * up * sigmoid * (1 + gate * (1 - sigmoid))
    grad_gate_up = torch.cat([grad_gate, g * w * silu], dim=-1).to(gate_up.dtype)
    return grad_gate_up, (g * silu * up).sum(-1).to(weights.dtype)


_backward_op = define(
    "weighted_swiglu_backward(Tensor grad, Tensor gate_up, Tensor weights) -> (Tensor, Tensor)",
    weighted_swiglu_backward_reference,
    lambda grad, gate_up, weights: (torch.empty_like(gate_up), torch.empty_like(weights)),
)
_op = define(
    "weighted_swiglu(Tensor gate_up, Tensor weights) -> Tensor",
    weighted_swiglu_reference,
    lambda gate_up, weights: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _backward_op(grad, *ctx.saved_tensors)


torch.library.register_autograd("engram::weighted_swiglu", _backward, setup_context=_setup, lib=LIBRARY)


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """`[P, 2F]` (gate first) and a weight for each row `[P]` -> silu(gate) * up * weight, `[P, F]`.

    Computed in float32 (float64 for float64), returned in the type of `gate_up`.
    """
    return _op(gate_up, weights)
