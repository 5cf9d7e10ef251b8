"""Causal attention within documents for short sequences on the CPU: products of all heads at once, softmax in one pass.

torch's own kernel cuts heads into blocks and multiplies them one by one in float32; with a few hundred positions its
time goes into starting small products, and in bfloat16 its backward pass takes three times as long again (torch 2.13).
Scores are made anew for the backward pass; some heads at a time, so that they stay in cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from engram.kernels.library import LIBRARY, define
from engram.kernels.products import products_in

_SCORES = 2**19  # of a chunk of heads: 2 MiB


def _visible(scores: Tensor, starts: Tensor | None, heads: int, first: int) -> Tensor:
    """Which keys a query sees, `[G, R, T]`; R is some multiple of T: query heads that share a key follow each other."""
    G, R, T = scores.shape
    key = torch.arange(T, device=scores.device)
    query = torch.arange(R, device=scores.device).remainder(T).unsqueeze(1)
    seen = (key <= query).expand(G, R, T)
    if starts is None:
        return seen
    sequence = torch.arange(first, first + G, device=scores.device) // heads
    return seen & (key >= starts[sequence].repeat(1, R // T).unsqueeze(-1))


def visible_softmax_reference_(scores: Tensor, starts: Tensor | None, heads: int, first: int) -> Tensor:
    """`visible_softmax_` in plain torch."""
    seen = _visible(scores, starts, heads, first)
    hidden = scores.masked_fill(~seen, -torch.inf)
    log_sum = hidden.logsumexp(-1)
    scores.copy_((hidden - log_sum.unsqueeze(-1)).exp())
    return log_sum


def visible_softmax_backward_reference_(
    scores: Tensor, grad: Tensor, log_sum: Tensor, delta: Tensor, starts: Tensor | None, heads: int, first: int
) -> None:
    """`visible_softmax_backward_` in plain torch."""
    seen = _visible(scores, starts, heads, first)
    p = (scores - log_sum.unsqueeze(-1)).exp().masked_fill(~seen, 0.0)
    grad.copy_(p * (grad - delta.unsqueeze(-1)))
    scores.copy_(p)


_softmax_ = define(
    "visible_softmax_(Tensor(a!) scores, Tensor? starts, int heads, int first) -> Tensor",
    visible_softmax_reference_,
    lambda scores, starts, heads, first: scores.new_empty(scores.shape[:2]),
)
_softmax_backward_ = define(
    "visible_softmax_backward_(Tensor(a!) scores, Tensor(b!) grad, Tensor log_sum, Tensor delta, Tensor? starts, "
    "int heads, int first) -> ()",
    visible_softmax_backward_reference_,
    lambda *args: None,
)


def _chunks(G: int, R: int, T: int) -> list[slice]:
    size = max(1, _SCORES // (R * T))
    return [slice(start, min(start + size, G)) for start in range(0, G, size)]


def _attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, bfloat16: bool) -> tuple[Tensor, Tensor]:
    (G, R, c), T = q.shape, k.shape[1]
    out, log_sum = q.new_empty(G, R, v.shape[2]), q.new_empty(G, R)
    heads = G // len(starts) if starts is not None else 1
    scaled = q * c**-0.5
    parts = _chunks(G, R, T)
    buffer = q.new_empty(parts[0].stop, R, T)
    with products_in(bfloat16):
        for part in parts:
            scores = torch.bmm(scaled[part], k[part].mT, out=buffer[: part.stop - part.start])
            log_sum[part] = _softmax_(scores, starts, heads, part.start)
            torch.bmm(scores, v[part], out=out[part])
    return out, log_sum


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, out: Tensor, log_sum: Tensor, bfloat16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (G, R, c), T = q.shape, k.shape[1]
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    heads = G // len(starts) if starts is not None else 1
    scaled, delta = q * c**-0.5, torch.linalg.vecdot(grad, out)
    parts = _chunks(G, R, T)
    buffers = q.new_empty(2, parts[0].stop, R, T)
    with products_in(bfloat16):
        for part in parts:
            scores, by_score = buffers[:, : part.stop - part.start]
            torch.bmm(scaled[part], k[part].mT, out=scores)
            torch.bmm(grad[part], v[part].mT, out=by_score)
            _softmax_backward_(scores, by_score, log_sum[part], delta[part], starts, heads, part.start)
            torch.bmm(by_score, k[part], out=grad_q[part])
            torch.bmm(by_score.mT, scaled[part], out=grad_k[part])
            torch.bmm(scores.mT, grad[part], out=grad_v[part])
    return grad_q.mul_(c**-0.5), grad_k, grad_v


_op = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? starts, bool bfloat16) -> (Tensor, Tensor)",
    _attention,
    lambda q, k, v, starts, bfloat16: (q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2])),
)
_backward_op = define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? starts, Tensor out, Tensor log_sum, "
    "bool bfloat16) -> (Tensor, Tensor, Tensor)",
    _attention_backward,
    lambda grad, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
)


def _flops(q: Any, k: Any, v: Any, *rest: Any, **others: Any) -> int:
    """Of the two products, in the way of torch's counter: by shapes, whatever the mask."""
    (G, R, c), T = q, k[1]
    return 2 * G * R * T * (c + v[2])


def _backward_flops(grad: Any, q: Any, k: Any, v: Any, *rest: Any, **others: Any) -> int:
    (G, R, c), T = q, k[1]
    return 2 * G * R * T * (3 * c + 2 * v[2])


register_flop_formula(torch.ops.engram.attention)(_flops)
register_flop_formula(torch.ops.engram.attention_backward)(_backward_flops)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.bfloat16 = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_backward_op(grad, *ctx.saved_tensors, ctx.bfloat16), None, None


torch.library.register_autograd("engram::attention", _backward, setup_context=_setup, lib=LIBRARY)


def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
    """Softmax attention of queries `[B, h, T, c]` on keys `[B, g, T, c]` and values `[B, g, T, w]`, g dividing h.

    Computed in float32 (float64 for float64) and returned in the type of `v`; if that is narrower, products take their
    factors in bfloat16. Memory for scores does not grow with B or h, but does with T^2.

    Args:
        starts: `[B, T]`, the first position that each one sees (the start of its document), 0 if None. The last is
            itself.
    """
    (B, h, T, _), g = q.shape, k.shape[1]
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k, v_wide = (x.to(wide).reshape(B * g, -1, x.shape[-1]) for x in (q, k, v))
    out, _ = _op(q, k, v_wide, starts, v.dtype == torch.bfloat16)
    return out.view(B, h, T, -1).to(v.dtype)
