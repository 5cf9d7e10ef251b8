"""A linear map of tokens in float32 on the CPU: on some processors MKL uses half the width of AVX-512."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from engram.kernels.library import define, differentiate

_FEW = 16

_backward_op = define(
    "linear_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor)",
    lambda grad, x, weight: (grad @ weight, grad.mT @ x),
    lambda grad, x, weight: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
_op = define(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    F.linear,
    lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
)


def _flops(x: Any, weight: Any, *rest: Any, **others: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


def _backward_flops(grad: Any, x: Any, weight: Any, **others: Any) -> int:
    return 2 * _flops(x, weight)


register_flop_formula(torch.ops.engram.linear)(_flops)
register_flop_formula(torch.ops.engram.linear_backward)(_backward_flops)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.biased = inputs[2] is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    return *_backward_op(grad, *ctx.saved_tensors), grad.sum(0) if ctx.biased else None


differentiate("linear", _backward, _setup)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b for `x` `[..., K]`, `weight` `[O, K]`, `bias` `[O]`: `[..., O]`.

    torch's own everywhere but for float32 on the CPU, outside autocast, and more than a few tokens.
    """
    device = x.device.type
    few = not torch.compiler.is_compiling() and x.shape[:-1].numel() < _FEW
    if device != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled(device) or few:
        return F.linear(x, weight, bias)
    return _op(x.flatten(0, -2), weight, bias).unflatten(0, x.shape[:-1])
