"""Scores -> the top-k experts of each token and their weights, with the loads and entropy that logs and balancing want.

DeepSeekMoE (arXiv:2401.06066, equations 9-11), with a bias for selection alone (arXiv:2408.15664, algorithm 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from engram.kernels.library import define, differentiate
from engram.kernels.products import products_in
from engram.tensors import widen


def scores_of(logits: Tensor, sigmoid: bool) -> Tensor:
    """Scores of all experts: a sigmoid of each logit, or a softmax over them."""
    return logits.sigmoid() if sigmoid else logits.softmax(-1)


def route_reference(
    logits: Tensor, bias: Tensor, k: int, sigmoid: bool, normalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route` in plain torch."""
    scores = scores_of(logits, sigmoid)
    experts = (scores.detach() + bias).topk(k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, experts)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    # A scatter, where bincount would make the host wait for the device.
    load = experts.new_zeros(logits.shape[1]).scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())
    share = scores.detach() / scores.detach().sum(-1, keepdim=True)
    # `torch.special.entr` takes twice as long: its logarithm is not vectorised.
    entropy = -(share * share.clamp_min(torch.finfo(share.dtype).tiny).log()).sum(-1).mean()
    return weights * scale, experts, load, entropy


def route_backward_reference(
    grad_weights: Tensor, logits: Tensor, experts: Tensor, sigmoid: bool, normalize: bool, scale: float
) -> Tensor:
    """Gradient of the logits."""
    scores = scores_of(logits, sigmoid)
    chosen = scores.gather(-1, experts)
    grad = grad_weights * scale
    if normalize:
        sums = chosen.sum(-1, keepdim=True)
        total = sums.clamp_min(1e-20)
        along = (grad * chosen).sum(-1, keepdim=True) / total
        grad = (grad - torch.where(sums < 1e-20, torch.zeros_like(along), along)) / total
    if sigmoid:
        return torch.zeros_like(scores).scatter(-1, experts, grad * chosen * (1 - chosen))
    mixed = (grad * chosen).sum(-1, keepdim=True)
    return (-scores * mixed).scatter_add(-1, experts, grad * chosen)


def _fake(logits: Tensor, bias: Tensor, k: int, *settings: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, E = logits.shape
    experts, load = (logits.new_empty(shape, dtype=torch.int64) for shape in ((N, k), (E,)))
    return logits.new_empty(N, k), experts, load, logits.new_empty(())


_SETTINGS = "bool sigmoid, bool normalize, float scale"
_op = define(
    f"route(Tensor logits, Tensor bias, int k, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)", route_reference, _fake
)
_backward_op = define(
    f"route_backward(Tensor grad_weights, Tensor logits, Tensor experts, {_SETTINGS}) -> Tensor",
    route_backward_reference,
    lambda grad_weights, logits, *rest: logits.new_empty(logits.shape),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, experts, load, entropy = output
    ctx.mark_non_differentiable(experts, load, entropy)
    ctx.save_for_backward(inputs[0], experts)
    ctx.settings = inputs[3:]


def _backward(ctx: Any, grad_weights: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    return _backward_op(grad_weights, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


differentiate("route", _backward, _setup)


def router_logits_reference(x: Tensor, weight: Tensor, bfloat16: bool) -> Tensor:
    """`router_logits` in plain torch."""
    wide = widen(x)
    return wide @ weight.to(wide.dtype).T


def router_logits_backward_reference(grad: Tensor, x: Tensor, weight: Tensor, bfloat16: bool) -> tuple[Tensor, Tensor]:
    """Gradients of tokens and router."""
    with products_in(bfloat16):
        grad_x, grad_weight = grad @ weight.to(grad.dtype), grad.T @ widen(x)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


_logits_op = define(
    "router_logits(Tensor x, Tensor weight, bool bfloat16) -> Tensor",
    router_logits_reference,
    lambda x, weight, bfloat16: widen(x).new_empty(x.shape[0], weight.shape[0]),
)
_logits_backward_op = define(
    "router_logits_backward(Tensor grad, Tensor x, Tensor weight, bool bfloat16) -> (Tensor, Tensor)",
    router_logits_backward_reference,
    lambda grad, x, weight, bfloat16: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)


def _logits_setup(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
    x, weight, ctx.bfloat16 = inputs
    ctx.save_for_backward(x, weight)


def _logits_grads(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_logits_backward_op(grad, *ctx.saved_tensors, ctx.bfloat16), None


differentiate("router_logits", _logits_grads, _logits_setup)


@register_flop_formula(torch.ops.engram.router_logits)
def _logits_flops(x: Any, weight: Any, *rest: Any, **others: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula(torch.ops.engram.router_logits_backward)
def _logits_backward_flops(grad: Any, x: Any, weight: Any, *rest: Any, **others: Any) -> int:
    return 4 * x[0] * x[1] * weight[0]


def router_logits(x: Tensor, weight: Tensor, bfloat16: bool) -> Tensor:
    """Tokens `[N, D]` and a router `[E, D]` -> logits `[N, E]`, in float32 (float64 for float64).

    With `bfloat16` the two products of the backward pass round their factors, as autocast does in those of all other
    maps; choices are made in full precision whatever it says.
    """
    return _logits_op(x, weight, bfloat16)


class Routed(NamedTuple):
    """weights: `[N, K]`. experts: `[N, K]`, int64. load: tokens of each expert, `[E]`, int64. entropy: of the scores
    divided by their sum, mean over tokens, in nats, `[]`."""

    weights: Tensor
    experts: Tensor
    load: Tensor
    entropy: Tensor


def route(logits: Tensor, bias: Tensor, k: int, *, sigmoid: bool, normalize: bool, scale: float) -> Routed:
    """The k experts with the largest score + bias of each token, and scores as weights, for logits `[N, E]`.

    The bias `[E]` decides who is chosen and never how much weight the chosen get, so no gradient reaches it. Weights
    are divided by their sum with `normalize`, then multiplied by `scale`. Logits are float32 or float64.
    """
    return Routed(*_op(logits, bias, k, sigmoid, normalize, scale))
