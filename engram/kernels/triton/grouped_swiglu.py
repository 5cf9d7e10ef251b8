"""`grouped_swiglu` and its backward for CUDA: torch's grouped products, and all between them in Triton.

Reference: engram/kernels/grouped_swiglu.py. Of a token's K rows none but the first product's is kept for the backward
pass: copies of tokens and the hidden layer are made again, for K d + d and K F numbers moved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.kernels.triton.spread import spread_triton, sum_rows_triton
from engram.kernels.triton.swiglu import swiglu_again_triton, swiglu_triton


def grouped_swiglu_triton(
    x: Tensor, weights: Tensor, place: Tensor, copy: Tensor, ends: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> tuple[Tensor, Tensor]:
    """As `grouped_swiglu_reference`, in bfloat16, for widths that `has_grouped_swiglu` takes."""
    if not len(copy):  # whose strides no grouped product likes
        return torch.zeros_like(x), x.new_empty(0, w_gate_up.shape[2])
    offsets = ends.int()
    gate_up = F.grouped_mm(spread_triton(x, place), w_gate_up.to(x.dtype), offs=offsets)
    hidden = swiglu_triton(gate_up, weights.flatten().index_select(0, copy))
    return sum_rows_triton(F.grouped_mm(hidden, w_down.to(x.dtype), offs=offsets), place), gate_up


def grouped_swiglu_backward_triton(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    place: Tensor,
    copy: Tensor,
    ends: Tensor,
    w_gate_up: Tensor,
    w_down: Tensor,
    gate_up: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `grouped_swiglu_backward_reference`; gradients of both matrices are rounded to the type of `x`."""
    if not len(copy):
        return torch.zeros_like(x), torch.zeros_like(weights), torch.zeros_like(w_gate_up), torch.zeros_like(w_down)
    offsets = ends.int()
    back = spread_triton(grad, place)
    of_hidden = F.grouped_mm(back, w_down.to(x.dtype).mT, offs=offsets)
    by_row = weights.flatten().index_select(0, copy)
    inner, of_weight, hidden = swiglu_again_triton(of_hidden, gate_up, by_row)
    # Rows of experts side by side: groups may then begin anywhere, and one without rows gets zeros.
    grad_down = F.grouped_mm(hidden.T, back, offs=offsets).to(w_down.dtype)
    del back, of_hidden, hidden  # 2 K d + 2 K F numbers a token, before as many are made
    grad_x = sum_rows_triton(F.grouped_mm(inner, w_gate_up.to(x.dtype).mT, offs=offsets), place)
    grad_gate_up = F.grouped_mm(spread_triton(x, place).T, inner, offs=offsets).to(w_gate_up.dtype)
    return grad_x, of_weight.index_select(0, place.flatten()).view_as(weights), grad_gate_up, grad_down
