"""`route` and its backward for CUDA, in Triton (references: engram/kernels/routing.py).

A program holds the logits of some tokens and takes their largest k times. Logits are read once each way, and their
gradient written once; the k chosen are looked up again, in a cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.routing import route_backward_reference, route_reference
from engram.kernels.triton.device import sigmoid
from engram.kernels.triton.launch import ceil_div

_BLOCK, _MOST_EXPERTS = 2048, 4096
_TINY, _FLOOR = tl.constexpr(torch.finfo(torch.float32).tiny), tl.constexpr(1e-20)  # as in the reference
_TAKEN = tl.constexpr(-(2**63))


@triton.jit
def _scores(logits, most, total, SIGMOID: tl.constexpr):
    """Given each token's largest logit and the sum of exp(logit - largest), which a sigmoid has no use for."""
    if SIGMOID:
        return sigmoid(logits)
    else:  # noqa: RET505 -- Triton compiles what follows a return
        return tl.exp(logits - most) / total


@triton.jit
def _load(logits, n, e, there, E: tl.constexpr, SIGMOID: tl.constexpr):
    """Scores of all experts of tokens n, 0 where there is none, and what `_scores` is given."""
    x = tl.load(logits + n[:, None] * E + e[None, :], mask=there, other=-float("inf"))
    most, total = 0.0, 1.0
    if not SIGMOID:
        most = tl.max(x, 1, keep_dims=True)
        most = tl.where(most == -float("inf"), 0.0, most)
        total = tl.sum(tl.exp(x - most), 1, keep_dims=True)
    return tl.where(there, _scores(x, most, total, SIGMOID), 0.0), most, total


@triton.jit(do_not_specialize=["N"])
def _route_kernel(
    logits, bias, weights, experts, load, entropy, N, scale,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, PADDED: tl.constexpr, CHOSEN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e, k = tl.arange(0, PADDED), tl.arange(0, CHOSEN)
    valid = n < N
    there = valid[:, None] & (e < E)[None, :]
    scores, most, total = _load(logits, n, e, there, E, SIGMOID)

    share = scores / tl.sum(scores, 1, keep_dims=True)
    of_token = tl.sum(share * tl.log(tl.maximum(share, _TINY)), 1)
    tl.store(entropy + tl.program_id(0), -tl.sum(tl.where(valid, of_token, 0.0), 0))

    # One number for a key and its expert, in the order of keys (NaN last, as topk has it), then of experts backwards.
    keys = scores + tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    bits = keys.to(tl.int32, bitcast=True)
    bits = tl.where(keys != keys, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    ranked = tl.where(there, (bits.to(tl.int64) << 32) | (PADDED - 1 - e)[None, :].to(tl.int64), _TAKEN)
    chosen = tl.zeros([TOKENS, CHOSEN], tl.int32)
    for j in range(K):
        best = tl.max(ranked, 1, keep_dims=True)
        ranked = tl.where(ranked == best, _TAKEN, ranked)
        chosen = tl.where((k == j)[None, :], PADDED - 1 - (best & 0xFFFFFFFF).to(tl.int32), chosen)
    counts = tl.sum((there & (ranked == _TAKEN)).to(tl.int32), 0)
    tl.atomic_add(load + e, counts.to(tl.int64), mask=(e < E) & (counts > 0), sem="relaxed")

    seen = valid[:, None] & (k < K)[None, :]
    x = tl.load(logits + n[:, None] * E + chosen, mask=seen, other=0.0)
    weight = tl.where(seen, _scores(x, most, total, SIGMOID), 0.0)
    if NORMALIZE:
        weight = weight / tl.maximum(tl.sum(weight, 1, keep_dims=True), _FLOOR)
    at = n[:, None] * K + k[None, :]
    tl.store(weights + at, weight * scale, mask=seen)
    tl.store(experts + at, chosen.to(tl.int64), mask=seen)


@triton.jit(do_not_specialize=["N"])
def _backward_kernel(
    grad_weights, logits, experts, grad_logits, N, scale,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, PADDED)
    valid = n < N
    there = valid[:, None] & (e < E)[None, :]
    scores, _, _ = _load(logits, n, e, there, E, SIGMOID)

    # Gradients of the chosen scores, in their experts' columns, and which columns these are.
    grad = tl.zeros([TOKENS, PADDED], tl.float32)
    chosen = tl.zeros([TOKENS, PADDED], tl.int1)
    for j in range(K):
        here = e[None, :] == tl.load(experts + n * K + j, mask=valid, other=0)[:, None]
        g = tl.load(grad_weights + n * K + j, mask=valid, other=0.0).to(tl.float32)
        grad = tl.where(here, g[:, None] * scale, grad)
        chosen = chosen | here
    if NORMALIZE:
        sums = tl.sum(tl.where(chosen, scores, 0.0), 1, keep_dims=True)
        floored = tl.maximum(sums, _FLOOR)
        along = tl.sum(grad * scores, 1, keep_dims=True) / floored
        grad = tl.where(chosen, (grad - tl.where(sums < _FLOOR, 0.0, along)) / floored, 0.0)
    grad *= scores
    out = grad * (1.0 - scores) if SIGMOID else grad - scores * tl.sum(grad, 1, keep_dims=True)
    tl.store(grad_logits + n[:, None] * E + e[None, :], out, mask=there)


def _runs(logits: Tensor, *others: Tensor) -> bool:
    """Whether there is something to do that the kernels do."""
    in_float64 = any(x.dtype == torch.float64 for x in others)
    return logits.dtype == torch.float32 and not in_float64 and logits.numel() > 0 and logits.shape[1] <= _MOST_EXPERTS


def route_triton(
    logits: Tensor, bias: Tensor, k: int, sigmoid: bool, normalize: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `route_reference`, a token's experts from the largest key down; the lowest numbers of those that are equal."""
    N, E = logits.shape
    if not _runs(logits, bias) or not 0 < k <= E:
        return route_reference(logits, bias, k, sigmoid, normalize, scale)
    padded = triton.next_power_of_2(E)
    tokens = max(min(_BLOCK // padded, triton.next_power_of_2(N)), 1)
    programs = ceil_div(N, tokens)
    weights, entropy = logits.new_empty(N, k), logits.new_empty(programs)
    experts = torch.empty(N, k, dtype=torch.int64, device=logits.device)
    load = torch.zeros(E, dtype=torch.int64, device=logits.device)
    _route_kernel[(programs,)](
        logits.contiguous(), bias.contiguous(), weights, experts, load, entropy, N, float(scale),
        E=E, K=k, SIGMOID=sigmoid, NORMALIZE=normalize,
        TOKENS=tokens, PADDED=padded, CHOSEN=triton.next_power_of_2(k), num_warps=4,
    )  # fmt: skip
    return weights, experts, load, entropy.sum() / N


def route_backward_triton(
    grad_weights: Tensor, logits: Tensor, experts: Tensor, sigmoid: bool, normalize: bool, scale: float
) -> Tensor:
    """As `route_backward_reference`, for experts that are distinct in a token."""
    N, E = logits.shape
    if not _runs(logits, grad_weights):
        return route_backward_reference(grad_weights, logits, experts, sigmoid, normalize, scale)
    padded = triton.next_power_of_2(E)
    tokens = max(min(_BLOCK // padded, triton.next_power_of_2(N)), 1)
    grad_logits = logits.new_empty(N, E)
    _backward_kernel[(ceil_div(N, tokens),)](
        grad_weights.contiguous(), logits.contiguous(), experts.contiguous(), grad_logits, N, float(scale),
        E=E, K=experts.shape[1], SIGMOID=sigmoid, NORMALIZE=normalize, TOKENS=tokens, PADDED=padded, num_warps=4,
    )  # fmt: skip
    return grad_logits
