"""Cross-entropy over the vocabulary without holding all logits: some rows at a time.

Gradients are made in the forward pass, while a chunk's logits are at hand, so that nothing is computed twice. Chunks
that stay in the CPU's cache make this faster there than torch's own, `linear_cross_entropy` of torch 2.13 included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engram.kernels import cross_entropy_
from engram.kernels.library import define, differentiate
from engram.tensors import product_type, widen

_CHUNK_LOGITS_CPU = 2**20  # 4 MiB of float32
_CHUNK_LOGITS = 2**26  # 256 MiB: a GPU wants few and large products
_MIN_ROWS = 128


def _mean_cross_entropy(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss of hidden states `[N, D]`, head `[V, D]` and targets `[N]`; gradients of the sum of losses."""
    h, w = hidden_ND.to(dtype), head_VD.to(dtype)
    N, V = len(h), len(w)
    rows = max(min(N, chunk_rows(w)), 1)
    # Every chunk is computed in this buffer: fresh ones would cost more than what is computed in them.
    buffer = h.new_empty(rows, V)
    grad_h = h.new_empty(h.shape)
    grad_w = torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32))
    total = grad_w.new_zeros(())
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        logits = torch.mm(h[part], w.T, out=buffer[: len(targets_N[part])])
        total += cross_entropy_(logits, targets_N[part]).sum()  # the logits are their gradient now
        torch.mm(logits, w, out=grad_h[part])
        grad_w += logits.T @ h[part]
    return total / N, grad_h, grad_w


def _fake(hidden: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        hidden.new_empty(hidden.shape, dtype=dtype),
        head.new_empty(head.shape, dtype=wide),
    )


_op = define(
    "mean_cross_entropy(Tensor hidden, Tensor head, Tensor targets, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    _mean_cross_entropy,
    _fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, grad_h, grad_w = output
    ctx.mark_non_differentiable(grad_h, grad_w)
    ctx.set_materialize_grads(False)  # of these: zeros as large as the head
    ctx.save_for_backward(grad_h, grad_w, *inputs[:2])
    ctx.types = inputs[0].dtype, inputs[1].dtype


def _backward(ctx: Any, grad: Tensor | None, *rest: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    grad_h, grad_w, *_ = ctx.saved_tensors
    scale = grad / grad_h.shape[0]  # len would fix the number in a compiled graph
    return (grad_h * scale).to(ctx.types[0]), (grad_w * scale).to(ctx.types[1]), None, None


differentiate("mean_cross_entropy", _backward, _setup)


def mean_loss(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of next tokens `[B, T]`, for hidden states `[B, T, d]` and a head `[V, d]`.

    Products are in the autocast type if autocast is on; the softmax is in float32 (float64 for float64 inputs).
    """
    return _op(hidden.flatten(0, -2), head_weight, targets.flatten(), product_type(hidden))[0]


@torch.no_grad()
def token_losses(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token, `[B, T]`, for evaluation: no gradient. Arguments as `mean_loss`."""
    dtype = product_type(hidden)
    h, w = hidden.flatten(0, -2).to(dtype), head_weight.to(dtype)
    rows = chunk_rows(w)
    chunks = zip(h.split(rows), targets.flatten().split(rows), strict=True)
    return torch.cat([losses_of(part @ w.T, t) for part, t in chunks]).view(targets.shape)


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each next token `[N]` by logits `[N, V]`, in float32 or wider."""
    wide = widen(logits)
    return wide.logsumexp(-1) - wide.gather(1, targets.unsqueeze(1)).squeeze(1)


def chunk_rows(head_VD: Tensor) -> int:
    """Of how many tokens the logits are held at once."""
    logits = _CHUNK_LOGITS_CPU if head_VD.device.type == "cpu" else _CHUNK_LOGITS
    return max(_MIN_ROWS, logits // len(head_VD))
