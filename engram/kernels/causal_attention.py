"""Causal attention within documents on the CPU.

torch's own kernel cuts heads into blocks and multiplies them one by one in float32; with a few hundred positions its
time goes into starting small products, and in bfloat16 its backward pass takes three times as long again (torch 2.13).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from engram.kernels.library import define, differentiate
from engram.kernels.native import load_native
from engram.tensors import widen


def has_attention(device: str) -> bool:
    """Whether a type of device ("cpu", "cuda") has a kernel for `attention`."""
    return device == "cpu" and load_native()


def _scores(q: Tensor, k: Tensor, starts: Tensor | None) -> Tensor:
    """Scores of queries and keys with as many heads, `[B, h, T, T]`, -inf for what a query may not see."""
    T = q.shape[1]
    key = torch.arange(T, device=q.device)
    seen = key <= key.unsqueeze(1)
    if starts is not None:
        seen = (seen & (key >= starts.unsqueeze(-1))).unsqueeze(1)
    return torch.einsum("bihc,bjhc->bhij", q, k).mul(q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)


def _wide(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All in the wide type of `v`, with as many heads of keys and values as there are of queries."""
    values = widen(v).repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    keys = k.to(values.dtype).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return q.to(values.dtype), keys, values


def attention_reference(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """`attention` in plain torch; what is returned second is kept for the backward pass."""
    queries, keys, values = _wide(q, k, v)
    scores = _scores(queries, keys, starts)
    log_sum = scores.logsumexp(-1)
    out = torch.einsum("bhij,bjhw->bihw", (scores - log_sum.unsqueeze(-1)).exp(), values)
    return out.to(v.dtype).contiguous(), log_sum


def attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    wide, (queries, keys, values) = widen(grad), _wide(q, k, v)
    share = (_scores(queries, keys, starts) - log_sum.unsqueeze(-1)).exp()
    delta = (wide * widen(out)).sum(-1).mT.unsqueeze(-1)
    by_score = share * (torch.einsum("bihw,bjhw->bhij", wide, values) - delta) * q.shape[-1] ** -0.5
    grad_q = torch.einsum("bhij,bjhc->bihc", by_score, keys)
    grad_k = torch.einsum("bhij,bihc->bjhc", by_score, queries)
    grad_v = torch.einsum("bhij,bihw->bjhw", share, wide)
    shared = (k.shape[2], q.shape[2] // k.shape[2])
    grad_k, grad_v = (x.unflatten(2, shared).sum(3) for x in (grad_k, grad_v))
    return tuple(g.to(x.dtype).contiguous() for g, x in ((grad_q, q), (grad_k, k), (grad_v, v)))  # type: ignore[return-value]


_op = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? starts) -> (Tensor, Tensor)",
    attention_reference,
    lambda q, k, v, starts: (
        v.new_empty(*q.shape[:3], v.shape[3]),
        v.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(v.dtype, torch.float32)),
    ),
)
_backward_op = define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor out, Tensor log_sum) -> "
    "(Tensor, Tensor, Tensor)",
    attention_backward_reference,
    lambda grad, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def _flops(q: Any, k: Any, v: Any, *rest: Any, **others: Any) -> int:
    """Of the two products, in the way of torch's counter: by shapes, whatever the mask."""
    B, T, h, c = q
    return 2 * B * h * T * T * (c + v[3])


def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **others: Any) -> int:
    B, T, h, c = q
    return 2 * B * h * T * T * (3 * c + 2 * v[3])


register_flop_formula(torch.ops.engram.attention)(_flops)
register_flop_formula(torch.ops.engram.attention_backward)(_backward_flops)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad, *ctx.saved_tensors), None


differentiate("attention", _backward, _setup)


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
    """Softmax attention of queries `[B, T, h, c]` on keys `[B, T, g, c]` and values `[B, T, g, w]`, g dividing h.

    Returns `[B, T, h, w]` in the type of `v`. Sums are float32 (float64 for float64 values); products take their
    factors in the type of `v`, or wider. The kernel's memory grows with T; the reference's with B h T^2.

    Args:
        starts: `[B, T]`, the first position that each one sees (the start of its document), 0 if None; never falling
            along T. The last is itself.
    """
    return _op(q, k, v, starts)[0]
