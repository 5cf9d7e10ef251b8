"""`router_logits` and its backward for CUDA: products of bfloat16 with sums in float32, in the place of float32 ones.

Reference: engram/kernels/routing.py. A product of two bfloat16 numbers is exact in float32, and three of them hold one
float32, so tokens in bfloat16 lose nothing: their logits take three such products, where a float32 one costs sixteen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.kernels.routing import router_logits_backward_reference, router_logits_reference


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Of matrices in bfloat16, in float32; tests come here with tensors of the CPU, which has no such product."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _pieces(x: Tensor) -> Tensor:
    """A float32 matrix `[E, D]` as the sum of three in bfloat16, `[3 * E, D]`."""
    first = x.bfloat16()
    second = (x - first).bfloat16()
    return torch.cat([first, second, (x - first - second).bfloat16()])


def router_logits_triton(x: Tensor, weight: Tensor, bfloat16: bool) -> Tensor:
    """As `router_logits_reference`, where tokens that are not in bfloat16 go."""
    if x.dtype != torch.bfloat16:
        return router_logits_reference(x, weight, bfloat16)
    if weight.dtype == torch.bfloat16:
        return _product(x, weight.T)
    return _product(x, _pieces(weight.float()).T).view(len(x), 3, len(weight)).sum(1)


def router_logits_backward_triton(grad: Tensor, x: Tensor, weight: Tensor, bfloat16: bool) -> tuple[Tensor, Tensor]:
    """As `router_logits_backward_reference`, where products whose factors are not to be rounded go."""
    if not bfloat16 or x.dtype == torch.float64:
        return router_logits_backward_reference(grad, x, weight, bfloat16)
    grad = grad.bfloat16()
    grad_x, grad_weight = _product(grad, weight.bfloat16()), _product(grad.T, x.bfloat16())
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)
