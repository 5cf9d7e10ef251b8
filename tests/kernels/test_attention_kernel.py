"""The CPU's attention against torch's `scaled_dot_product_attention`, the softmax kernels against their references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.kernels import attention, load_native
from engram.kernels.causal_attention import visible_softmax_backward_reference_, visible_softmax_reference_


@pytest.fixture(autouse=True)
def _native() -> None:
    load_native()


def documents(B: int, T: int) -> tuple[Tensor, Tensor]:
    """First visible position of each, and the same as a mask."""
    ids = (torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < 0.15).long().cumsum(1)
    starts = torch.stack([torch.tensor([int((row == row[t]).nonzero()[0]) for t in range(T)]) for row in ids])
    mask = (ids[:, :, None] == ids[:, None, :]) & torch.ones(T, T, dtype=torch.bool).tril()
    return starts, mask.unsqueeze(1)


def heads(B: int, h: int, g: int, T: int, c: int, w: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(B, n, T, size, dtype=dtype).requires_grad_() for n, size in ((h, c), (g, c), (g, w))]


@pytest.mark.parametrize(("h", "g"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("B", "T"), [(2, 1), (3, 17), (2, 64)])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_torchs(B: int, T: int, h: int, g: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three heads at a time, with a rest.
    monkeypatch.setattr("engram.kernels.causal_attention._SCORES", 3 * T * T * h // g)
    q, k, v = heads(B, h, g, T, 8, 5)
    starts, mask = documents(B, T) if packed else (None, torch.ones(T, T, dtype=torch.bool).tril())
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    out = attention(q, k, v, starts)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_bfloat16_values_are_no_further_off_than_torchs_own_bfloat16() -> None:
    q, k, v = heads(4, 2, 2, 96, 32, 32, torch.float32)
    starts, mask = documents(4, 96)
    exact = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    grad = torch.randn_like(exact)
    wanted = torch.autograd.grad(exact, (q, k, v), grad)
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    torchs = F.scaled_dot_product_attention(*low, attn_mask=mask)
    out = attention(q, k, low[2], starts)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().mean() <= 1.1 * (torchs.float() - exact).abs().mean()
    ours = torch.autograd.grad(out, (q, k, low[2]), grad.bfloat16())
    theirs = torch.autograd.grad(torchs, low, grad.bfloat16())
    for x, y, z in zip(ours, theirs, wanted, strict=True):
        assert (x.float() - z).abs().mean() <= 1.1 * (y.float() - z).abs().mean()


def test_the_precision_of_other_products_is_left_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    q, k, v = heads(1, 1, 1, 4, 8, 8, torch.float32)
    attention(q, k, v.bfloat16(), None).float().sum().backward()
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]


@pytest.mark.parametrize("packed", [False, True])
def test_softmax_kernels_do_what_their_references_do(packed: bool) -> None:
    B, h, R, T, first = 2, 3, 10, 5, 2
    starts = documents(B, T)[0] if packed else None
    scores = torch.randn(B * h - first, R, T, dtype=torch.float64)
    ours, theirs = scores.clone(), scores.clone()
    log_sum = torch.ops.engram.visible_softmax_(ours, starts, h, first)
    torch.testing.assert_close(log_sum, visible_softmax_reference_(theirs, starts, h, first))
    torch.testing.assert_close(ours, theirs)
    grad, delta = torch.randn_like(scores), torch.randn(B * h - first, R, dtype=torch.float64)
    pairs = [(scores.clone(), grad.clone()) for _ in range(2)]
    torch.ops.engram.visible_softmax_backward_(*pairs[0], log_sum, delta, starts, h, first)
    visible_softmax_backward_reference_(*pairs[1], log_sum, delta, starts, h, first)
    for x, y in zip(*pairs, strict=True):
        torch.testing.assert_close(x, y)


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    q, k, v = (x.detach().flatten(0, 1).requires_grad_() for x in heads(2, 2, 2, 6, 4, 4, torch.float32))
    torch.library.opcheck(torch.ops.engram.attention.default, (q, k, v, documents(2, 6)[0], False))
