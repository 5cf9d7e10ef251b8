"""How fetched rows join the residual stream: gate, value, short convolution (arXiv:2601.07372, sections 2.3 and 2.4).

    alpha = sigmoid(squash(RMSNorm(h) . RMSNorm(k) / sqrt(d)))      one for each token and branch
    u     = alpha v
    Y     = SiLU(Conv1D(RMSNorm(u))) + u                            and h + Y, with the residual

v is shared by the branches, and RMSNorm(u) = s v with s = alpha / sqrt(alpha^2 mean(v^2) + eps), one number for each
token and branch: so u, M times as large as v, is never made.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.kernels.library import define, differentiate
from engram.tensors import widen

_SQUASH_FLOOR = 1e-6


def signed_sqrt(g: Tensor) -> Tensor:
    """sign(g) * sqrt(max(|g|, 1e-6)): the compression that the demonstration code puts before the sigmoid."""
    return g.sign() * g.abs().clamp_min(_SQUASH_FLOOR).sqrt()


class _Tap(NamedTuple):
    """A tap of the convolution: how far back it reaches, its weights `[M, D]`, and where it counts `[B, T, 1, 1]`."""

    back: int
    weight: Tensor
    joined: Tensor


def _taps(weight: Tensor, documents: Tensor | None, past: int, B: int, T: int, dilation: int) -> list[_Tap]:
    P = (len(weight) - 1) * dilation  # positions before the sequence that a tap could reach, filled up with none
    at = torch.arange(-P, T, device=weight.device).expand(B, -1)
    there = at >= -past
    if documents is None:
        documents = torch.zeros_like(at)
    else:
        documents = F.pad(documents, (P - past, 0)) if past <= P else documents[:, past - P :]
    taps = []
    for j in range(len(weight)):
        back = (len(weight) - 1 - j) * dilation
        then = slice(P - back, P - back + T)
        joined = there[:, then] & (documents[:, then] == documents[:, P:])
        taps.append(_Tap(back, weight[j], joined[:, :, None, None]))
    return taps


def _before(x: Tensor, past: Tensor | None, length: int) -> Tensor:
    """`x` `[B, T, ...]` with the `length` positions before it: those of `past`, and zeros where it holds none."""
    if past is not None:
        x = torch.cat([past.to(x.dtype), x], 1)
    missing = length - (0 if past is None else past.shape[1])
    return F.pad(x, (0, 0) * (x.ndim - 2) + (missing, 0)) if missing >= 0 else x[:, -missing:]


def fuse_memory_reference(
    hidden: Tensor,
    kv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor | None,
    conv_weight: Tensor | None,
    documents: Tensor | None,
    past_values: Tensor | None,
    past_scales: Tensor | None,
    eps: float,
    squash: bool,
    dilation: int,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fuse_memory` in plain torch; what is returned third is kept for the backward pass."""
    M, D = hidden.shape[2:]
    h, wide_kv = widen(hidden), widen(kv)
    k, v = wide_kv[..., : M * D].unflatten(-1, (M, D)), wide_kv[..., M * D :]
    dot = (h * k * (widen(query_norm) * widen(key_norm))).sum(-1)
    inv_h, inv_k = (torch.rsqrt(x.square().mean(-1) + eps) for x in (h, k))
    g = dot * inv_h * inv_k / math.sqrt(D)
    alpha = torch.sigmoid(signed_sqrt(g) if squash else g)
    inv_u = torch.rsqrt(alpha.square() * v.square().mean(-1, keepdim=True) + eps)
    stats = torch.stack([dot, inv_h, inv_k, inv_u], -1)
    used = _used(alpha, documents, past_values)
    y = used.unsqueeze(-1) * v.unsqueeze(2)
    if conv_weight is not None:
        assert conv_norm is not None
        y = y + F.silu(
            _convolve(v, used * inv_u, conv_norm, conv_weight, documents, past_values, past_scales, dilation)
        )
    return (h + y if residual else y).to(hidden.dtype).contiguous(), alpha.contiguous(), stats


def _used(alpha: Tensor, documents: Tensor | None, past_values: Tensor | None) -> Tensor:
    """Gates, 0 at padding (document ids below 0)."""
    if documents is None:
        return alpha
    past = 0 if past_values is None else past_values.shape[1]
    return alpha * (documents[:, past:] >= 0).unsqueeze(-1)


def _convolve(
    v: Tensor,
    scales: Tensor,
    norm: Tensor,
    weight: Tensor,
    documents: Tensor | None,
    past_values: Tensor | None,
    past_scales: Tensor | None,
    dilation: int,
) -> Tensor:
    """z `[B, T, M, D]`: what goes into the SiLU."""
    (B, T), past = v.shape[:2], 0 if past_values is None else past_values.shape[1]
    P = (len(weight) - 1) * dilation
    x = _before(scales, past_scales, P).unsqueeze(-1) * _before(v, past_values, P).unsqueeze(2) * widen(norm)
    return sum(
        (
            x[:, P - tap.back : P - tap.back + T] * widen(tap.weight) * tap.joined
            for tap in _taps(weight, documents, past, B, T, dilation)
        ),
        torch.zeros_like(x[:, :T]),
    )


def fuse_memory_backward_reference(
    grad_out: Tensor,
    grad_alpha: Tensor | None,
    hidden: Tensor,
    kv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor | None,
    conv_weight: Tensor | None,
    documents: Tensor | None,
    past_values: Tensor | None,
    past_scales: Tensor | None,
    alpha: Tensor,
    stats: Tensor,
    eps: float,
    squash: bool,
    dilation: int,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of hidden, kv, query_norm, key_norm, conv_norm and conv_weight (the last two empty without a conv)."""
    B, T, M, D = hidden.shape
    gy, h, wide_kv = widen(grad_out), widen(hidden), widen(kv)
    k, v = wide_kv[..., : M * D].unflatten(-1, (M, D)), wide_kv[..., M * D :]
    v_M = v.unsqueeze(2)
    dot, inv_h, inv_k, inv_u = stats.unbind(-1)
    used = _used(alpha, documents, past_values)
    shown = _used(torch.ones_like(alpha), documents, past_values)
    grad_a = shown * (gy * v_M).sum(-1)
    grad_v = (used.unsqueeze(-1) * gy).sum(2)
    grad_norm = grad_weight = query_norm.new_empty(0)
    if conv_weight is not None:
        assert conv_norm is not None
        scales = used * inv_u
        z = _convolve(v, scales, conv_norm, conv_weight, documents, past_values, past_scales, dilation)
        grad_z = gy * z.sigmoid() * (1 + z * (1 - z.sigmoid()))
        P, past = (len(conv_weight) - 1) * dilation, 0 if past_values is None else past_values.shape[1]
        x = _before(scales, past_scales, P).unsqueeze(-1) * _before(v, past_values, P).unsqueeze(2)
        grad_x = torch.zeros_like(x)
        by_tap = []
        for tap in _taps(conv_weight, documents, past, B, T, dilation):
            then = slice(P - tap.back, P - tap.back + T)
            grad_x[:, then] += grad_z * widen(tap.weight) * tap.joined
            by_tap.append((grad_z * tap.joined * x[:, then]).sum((0, 1)))
        per_tap = torch.stack(by_tap)
        grad_norm = (per_tap * widen(conv_weight)).sum(0).to(conv_norm.dtype)
        grad_weight = (per_tap * widen(conv_norm)).to(conv_weight.dtype)
        grad_x = grad_x[:, P:] * widen(conv_norm) * shown.unsqueeze(-1)
        grad_s = (grad_x * v_M).sum(-1)
        # s = alpha inv_u, with inv_u = (alpha^2 mean(v^2) + eps)^(-1/2).
        grad_a = grad_a + grad_s * eps * inv_u**3
        along_v = -(grad_s * inv_u**3 * alpha**3).sum(-1) / D
        grad_v = grad_v + (scales.unsqueeze(-1) * grad_x).sum(2) + along_v.unsqueeze(-1) * v
    if grad_alpha is not None:
        grad_a = grad_a + grad_alpha
    g = dot * inv_h * inv_k / math.sqrt(D)
    slope = torch.ones_like(g)
    if squash:
        slope = torch.where(g.abs() >= _SQUASH_FLOOR, 0.5 * g.abs().clamp_min(_SQUASH_FLOOR).rsqrt(), 0.0)
    grad_g = grad_a * alpha * (1 - alpha) * slope / math.sqrt(D)
    both = widen(query_norm) * widen(key_norm)
    cross = (grad_g * inv_h * inv_k).unsqueeze(-1)
    along_h = (-grad_g * dot * inv_k * inv_h**3 / D).unsqueeze(-1)
    along_k = (-grad_g * dot * inv_h * inv_k**3 / D).unsqueeze(-1)
    grad_h = cross * both * k + along_h * h + (gy if residual else 0)
    grad_k = cross * both * h + along_k * k
    grad_both = (cross * h * k).sum((0, 1))
    return (
        grad_h.to(hidden.dtype).contiguous(),
        torch.cat([grad_k.flatten(2), grad_v], -1).to(kv.dtype).contiguous(),
        (grad_both * widen(key_norm)).to(query_norm.dtype).contiguous(),
        (grad_both * widen(query_norm)).to(key_norm.dtype).contiguous(),
        grad_norm.contiguous(),
        grad_weight.contiguous(),
    )


def _fake(hidden: Tensor, kv: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = widen(hidden.new_empty(0))
    shape = hidden.shape[:3]
    return torch.empty_like(hidden).contiguous(), wide.new_empty(shape), wide.new_empty(*shape, 4)


def _backward_fake(
    grad_out: Tensor,
    grad_alpha: Tensor | None,
    hidden: Tensor,
    kv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor | None,
    conv_weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, ...]:
    given = [hidden, kv, query_norm, key_norm, conv_norm, conv_weight]
    return tuple(query_norm.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


_INPUTS = (
    "Tensor hidden, Tensor kv, Tensor query_norm, Tensor key_norm, Tensor? conv_norm, Tensor? conv_weight, "
    "Tensor? documents, Tensor? past_values, Tensor? past_scales"
)
_SETTINGS = "float eps, bool squash, int dilation, bool residual"
_op = define(f"fuse_memory({_INPUTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)", fuse_memory_reference, _fake)
_backward_op = define(
    f"fuse_memory_backward(Tensor grad_out, Tensor? grad_alpha, {_INPUTS}, Tensor alpha, Tensor stats, {_SETTINGS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fuse_memory_backward_reference,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, alpha, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], alpha, stats)
    ctx.settings = inputs[9:]


def _backward(ctx: Any, grad_out: Tensor | None, grad_alpha: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    hidden, *rest = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(hidden)
    grads = _backward_op(grad_out, grad_alpha, hidden, *rest, *ctx.settings)
    given = [grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:6], strict=True)]
    return (*given, *[None] * 7)


differentiate("fuse_memory", _backward, _setup)


class Fused(NamedTuple):
    """out: `[B, T, M, D]`, in the type of `hidden`. alpha: gates `[B, T, M]`, also at padding. scales: `[B, T, M]`,
    what values are multiplied by to give the normed inputs of the convolution; both float32, or float64 for float64."""

    out: Tensor
    alpha: Tensor
    scales: Tensor


def fuse_memory(
    hidden: Tensor,
    kv: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    conv_norm: Tensor | None = None,
    conv_weight: Tensor | None = None,
    documents: Tensor | None = None,
    past_values: Tensor | None = None,
    past_scales: Tensor | None = None,
    *,
    eps: float,
    squash: bool,
    dilation: int = 1,
    residual: bool = False,
) -> Fused:
    """Gate, value and convolution of a memory layer: Y, or `hidden + Y` with `residual`.

    Differentiable once, in all but documents and past. Computed in float32 (float64 for float64 inputs).

    Args:
        hidden: h, `[B, T, M, D]`.
        kv: M keys, then the value, `[B, T, (M + 1) D]`.
        query_norm, key_norm, conv_norm: scales of the three norms, `[M, D]`; `conv_norm` goes with `conv_weight`.
        conv_weight: `[taps, M, D]`, the token's own tap last; None for no convolution (Y = u).
        documents: `[B, P + T]`; a tap counts only within its token's document. Below 0: padding, which gets no update.
        past_values, past_scales: v `[B, P, D]` and `scales` `[B, P, M]` of the P positions before, for decoding.
        eps: of all norms.
        squash: whether a signed square root comes before the sigmoid.
        dilation: distance between taps.
    """
    kernel_types = {torch.float16: torch.float32}  # what kernels have no version for goes one type up
    own = kernel_types.get(hidden.dtype, hidden.dtype)
    kv_type = kernel_types.get(kv.dtype, kv.dtype)
    own = torch.promote_types(own, kv_type)
    kv_type = own if own == torch.float64 else kv_type
    out, alpha, stats = _op(
        hidden.to(own),
        kv.to(kv_type),
        query_norm,
        key_norm,
        conv_norm,
        conv_weight,
        documents,
        None if past_values is None else past_values.to(kv_type),
        None if past_scales is None else past_scales.to(torch.promote_types(own, torch.float32)),
        eps,
        squash,
        dilation,
        residual,
    )
    return Fused(out.to(hidden.dtype), alpha, _used(alpha, documents, past_values) * stats[..., 3].detach())
