"""RMSNorm (arXiv:1910.07467), alone or followed by rotary positions (arXiv:2104.09864), in one pass each way.

Both compute in float32 (float64 for float64) whatever type comes in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engram.kernels.library import define, differentiate
from engram.tensors import widen


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, all wide; `inverse` has x's axes."""
    n = x * inverse
    grad_n = grad * weight
    # n keeps its length whatever x does, so the part of the gradient along n is taken out.
    along = (grad_n * n).mean(-1, keepdim=True)
    return (grad_n - n * along) * inverse, (grad * n).reshape(-1, n.shape[-1]).sum(0)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`rms_norm` in plain torch; what is returned second is kept for the backward pass."""
    wide = widen(x)
    inverse = _inverse_rms(wide, eps)
    return (wide * inverse * widen(weight)).to(x.dtype).contiguous(), inverse.flatten()


def rms_norm_backward_reference(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight."""
    scale = inverse.view(*x.shape[:-1], 1)
    grad_x, grad_weight = _norm_backward(widen(grad), widen(x), widen(weight), scale)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def norm_rotate_reference(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`norm_rotate` in plain torch; what is returned second is kept for the backward pass."""
    wide = widen(x)
    inverse = wide.new_empty(0)
    if weight is not None:
        scale = _inverse_rms(wide, eps)
        wide, inverse = wide * scale * widen(weight), scale.flatten()
    turned = _rotate(wide, cos.unsqueeze(1), sin.unsqueeze(1))
    return turned.to(x.dtype).contiguous(), inverse


def norm_rotate_backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight (empty without one)."""
    back = _rotate(widen(grad), cos.unsqueeze(1), -sin.unsqueeze(1))
    if weight is None:
        return back.to(x.dtype).contiguous(), inverse
    scale = inverse.view(*x.shape[:-1], 1)
    grad_x, grad_weight = _norm_backward(back, widen(x), widen(weight), scale)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


def _new(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _wide_empty(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))


_norm_backward_op = define(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor inverse) -> (Tensor, Tensor)",
    rms_norm_backward_reference,
    lambda grad, x, weight, inverse: (_new(x), _new(weight)),
)
_norm_op = define(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    rms_norm_reference,
    lambda x, weight, eps: (_new(x), _wide_empty(x, x.numel() // x.shape[-1])),
)
_rotate_backward_op = define(
    "norm_rotate_backward(Tensor grad, Tensor x, Tensor? weight, Tensor cos, Tensor sin, Tensor inverse) -> "
    "(Tensor, Tensor)",
    norm_rotate_backward_reference,
    lambda grad, x, weight, cos, sin, inverse: (_new(x), _wide_empty(x, 0) if weight is None else _new(weight)),
)
_rotate_op = define(
    "norm_rotate(Tensor x, Tensor? weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
    norm_rotate_reference,
    lambda x, weight, cos, sin, eps: (
        _new(x),
        _wide_empty(x, 0 if weight is None else x.numel() // x.shape[-1]),
    ),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:-1], output[1])


def _norm_grads(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:
    return (*_norm_backward_op(grad, *ctx.saved_tensors), None)


def _rotate_grads(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    x, weight, *rest = ctx.saved_tensors
    grad_x, grad_weight = _rotate_backward_op(grad, x, weight, *rest)
    return grad_x, None if weight is None else grad_weight, None, None, None


differentiate("rms_norm", _norm_grads, _setup)
differentiate("norm_rotate", _rotate_grads, _setup)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis of `[..., D]`, in the type of `x`."""
    return _norm_op(x, weight, eps)[0]


def norm_rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm of heads `[B, T, h, c]` (skipped if `weight` is None), turned by their positions' angles `[T, c / 2]`.

    Dimension i turns with i + c/2. In the type of `x`. Gradients go to `x` and `weight`.
    """
    return _rotate_op(x, weight, cos, sin, eps)[0]
