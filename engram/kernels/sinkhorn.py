"""What hyper-connections (arXiv:2512.24880) do for each token: scale a matrix, read branches, and write to them.

Alone, each is a chain of small operations on `[..., M, M]` or of batched products of tiny matrices. All compute in
float32 (float64 for float64) whatever type comes in, and each takes one pass in either direction.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from engram.kernels.library import define, differentiate
from engram.tensors import widen

_COLUMNS, _ROWS = 0, 1  # the axis that is summed over, in a matrix [M, M, ...] whose tokens come last


def _scaled(logits: Tensor, steps: int) -> tuple[Tensor, list[Tensor]]:
    """The result, tokens last so that each sum runs over all of them at once, and what each division divided by but for
    the first of the columns.

    The first step is done on the logits themselves. After it each row has an element of at least 1/M and each column
    one of 1/M^2, and they keep that, so that no sum can vanish, whatever the logits.
    """
    x = widen(logits).movedim((-2, -1), (0, 1)).contiguous()
    x = x - x.amax(_COLUMNS, keepdim=True)
    most = x.amax(_ROWS, keepdim=True)
    p = (x - most).exp() / x.exp().sum(_COLUMNS, keepdim=True)
    total = p.sum(_ROWS, keepdim=True)
    p, totals = p / total, [total * most.exp()]
    for axis in [_COLUMNS, _ROWS] * (steps - 1):
        totals.append(p.sum(axis, keepdim=True))
        p = p / totals[-1]
    return p, totals


def _tokens_first(x: Tensor, like: Tensor) -> Tensor:
    return x.movedim((0, 1), (-2, -1)).to(like.dtype).contiguous()


def sinkhorn_reference(logits: Tensor, steps: int) -> Tensor:
    """`sinkhorn` in plain torch."""
    return _tokens_first(_scaled(logits, steps)[0], logits)


def sinkhorn_backward_reference(grad: Tensor, logits: Tensor, steps: int) -> Tensor:
    """Gradient of the logits, through the steps in reverse: of the logarithm of p before a division, each time."""
    p, totals = _scaled(logits, steps)
    g = widen(grad).movedim((-2, -1), (0, 1)) * p
    for axis, total in zip([_ROWS, _COLUMNS] * steps, [*reversed(totals), None], strict=True):
        g = g - p * g.sum(axis, keepdim=True)
        p = p if total is None else p * total
    return _tokens_first(g, logits)


def read_branches_reference(hidden: Tensor, weights: Tensor) -> Tensor:
    """`read_branches` in plain torch."""
    return (widen(weights).unsqueeze(-1) * widen(hidden)).sum(-2).to(hidden.dtype).contiguous()


def read_branches_backward_reference(grad: Tensor, hidden: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states and weights."""
    g = widen(grad).unsqueeze(-2)
    grads = widen(weights).unsqueeze(-1) * g, (g * widen(hidden)).sum(-1)
    return grads[0].to(hidden.dtype).contiguous(), grads[1].to(weights.dtype).contiguous()


def write_branches_reference(hidden: Tensor, update: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """`write_branches` in plain torch."""
    wide = widen(hidden)
    update, post, res = (x.to(wide.dtype) for x in (update, post, res))
    return torch.addcmul(res @ wide, post.unsqueeze(-1), update.unsqueeze(-2)).to(hidden.dtype).contiguous()


def write_branches_backward_reference(
    grad: Tensor, hidden: Tensor, update: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of all that is written from, in their order."""
    g, inputs = widen(grad), (hidden, update, post, res)
    hidden, update, post, res = (x.to(g.dtype) for x in inputs)
    grads = (
        res.mT @ g,
        (post.unsqueeze(-1) * g).sum(-2),
        (g * update.unsqueeze(-2)).sum(-1),
        g @ hidden.mT,
    )
    hidden_, update_, post_, res_ = (x.to(like.dtype).contiguous() for x, like in zip(grads, inputs, strict=True))
    return hidden_, update_, post_, res_


def _new(*like: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in like)


_sinkhorn_backward_op = define(
    "sinkhorn_backward(Tensor grad, Tensor logits, int steps) -> Tensor",
    sinkhorn_backward_reference,
    lambda grad, logits, steps: logits.new_empty(logits.shape),
)
_sinkhorn_op = define(
    "sinkhorn(Tensor logits, int steps) -> Tensor",
    sinkhorn_reference,
    lambda logits, steps: logits.new_empty(logits.shape),
)
_read_backward_op = define(
    "read_branches_backward(Tensor grad, Tensor hidden, Tensor weights) -> (Tensor, Tensor)",
    read_branches_backward_reference,
    lambda grad, *inputs: _new(*inputs),
)
_read_op = define(
    "read_branches(Tensor hidden, Tensor weights) -> Tensor",
    read_branches_reference,
    lambda hidden, weights: hidden.new_empty(*hidden.shape[:-2], hidden.shape[-1]),
)
_write_backward_op = define(
    "write_branches_backward(Tensor grad, Tensor hidden, Tensor update, Tensor post, Tensor res) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    write_branches_backward_reference,
    lambda grad, *inputs: _new(*inputs),
)
_write_op = define(
    "write_branches(Tensor hidden, Tensor update, Tensor post, Tensor res) -> Tensor",
    write_branches_reference,
    lambda hidden, *rest: hidden.new_empty(hidden.shape),
)


def _sinkhorn_setup(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    logits, ctx.steps = inputs
    ctx.save_for_backward(logits)


def _sinkhorn_grads(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _sinkhorn_backward_op(grad, *ctx.saved_tensors, ctx.steps), None


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _read_grads(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _read_backward_op(grad, *ctx.saved_tensors)


def _write_grads(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _write_backward_op(grad, *ctx.saved_tensors)


differentiate("sinkhorn", _sinkhorn_grads, _sinkhorn_setup)
differentiate("read_branches", _read_grads, _setup)
differentiate("write_branches", _write_grads, _setup)


@register_flop_formula(torch.ops.engram.write_branches)
def _write_flops(hidden: Any, *rest: Any, **others: Any) -> int:
    """Of the product of matrices; torch counts nothing that works by element."""
    return 2 * hidden[-2] * math.prod(hidden)


@register_flop_formula(torch.ops.engram.write_branches_backward)
def _write_backward_flops(grad: Any, *rest: Any, **others: Any) -> int:
    return 4 * grad[-2] * math.prod(grad)


def sinkhorn(logits: Tensor, steps: int = 20) -> Tensor:
    """exp(logits) `[..., M, M]` made doubly stochastic by `steps` (1 or more) Sinkhorn-Knopp steps, each columns first,
    then rows; 20 are the paper's.

    Rows sum to one, columns as far as the steps bring them. The gradient is that of these steps, not of their limit.
    """
    return _sinkhorn_op(logits, steps)


def read_branches(hidden: Tensor, weights: Tensor) -> Tensor:
    """Branches `[..., M, D]` -> their sum with weights `[..., M]`, `[..., D]`, in the type of `hidden`."""
    return _read_op(hidden, weights)


def write_branches(hidden: Tensor, update: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """res `[..., M, M]` times branches `[..., M, D]`, and post `[..., M]` times the update `[..., D]` added to them.

    `[..., M, D]` in the type of `hidden`.
    """
    return _write_op(hidden, update, post, res)
