"""The CPU's attention and its reference against torch's `scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engram.kernels import attention, load_native
from engram.kernels.causal_attention import attention_backward_reference, attention_reference


@pytest.fixture(autouse=True)
def _native() -> None:
    load_native()


def documents(B: int, T: int, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """First visible position of each, and the same as a mask."""
    ids = (torch.rand(B, T, generator=torch.Generator().manual_seed(T)) < share).long().cumsum(1)
    starts = torch.stack([torch.tensor([int((row == row[t]).nonzero()[0]) for t in range(T)]) for row in ids])
    mask = (ids[:, :, None] == ids[:, None, :]) & torch.ones(T, T, dtype=torch.bool).tril()
    return starts, mask.unsqueeze(1)


def heads(B: int, h: int, g: int, T: int, c: int, w: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(B, T, n, size, dtype=dtype).requires_grad_() for n, size in ((h, c), (g, c), (g, w))]


def torchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    turned = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*turned, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def by_kernel(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    out = attention(q, k, v, starts)
    return out, list(torch.autograd.grad(out, (q, k, v), grad))


def by_reference(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    with torch.no_grad():
        out, log_sum = attention_reference(q, k, v, starts)
        return out, list(attention_backward_reference(grad, q, k, v, starts, out, log_sum))


@pytest.mark.parametrize("way", [by_kernel, by_reference])
@pytest.mark.parametrize(("h", "g"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("B", "T", "c", "w"), [(2, 1, 8, 5), (3, 17, 8, 5), (2, 64, 6, 16), (1, 133, 40, 72)])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_torchs(
    way: Callable[..., tuple[Tensor, list[Tensor]]], B: int, T: int, c: int, w: int, h: int, g: int, packed: bool
) -> None:
    q, k, v = heads(B, h, g, T, c, w)
    starts, mask = documents(B, T) if packed else (None, torch.ones(T, T, dtype=torch.bool).tril())
    expected = torchs(q, k, v, mask)
    grad = torch.randn_like(expected)
    out, grads = way(grad, q, k, v, starts)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("c", "w"), [(32, 32), (48, 20), (7, 5)])
def test_float32_is_as_close_to_float64_as_torchs(c: int, w: int) -> None:
    q, k, v = heads(2, 4, 2, 70, c, w, torch.float32)
    starts, mask = documents(2, 70)
    grad = torch.randn(2, 70, 4, w)
    out, grads = by_kernel(grad, q, k, v, starts)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = torchs(*exact, mask)
    torch.testing.assert_close(out, wanted.float(), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(grads, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("T", "c", "w"), [(96, 32, 32), (51, 24, 40), (33, 7, 9)])
@pytest.mark.parametrize("share", [0.0, 0.15])
def test_bfloat16_is_off_by_its_rounding_and_no_more(T: int, c: int, w: int, share: float) -> None:
    starts, mask = documents(4, T, share)
    low = [x.detach().bfloat16().requires_grad_() for x in heads(4, 4, 2, T, c, w, torch.float32)]
    exact = [x.detach().double().requires_grad_() for x in low]
    wanted = torchs(*exact, mask)
    grad = torch.randn_like(wanted).bfloat16()
    out, grads = by_kernel(grad, *low, starts)
    assert out.dtype == torch.bfloat16
    for ours, right in zip((out, *grads), (wanted, *torch.autograd.grad(wanted, exact, grad.double())), strict=True):
        assert (ours.double() - right).abs().mean() <= 2**-8 * right.abs().mean()


def test_bfloat16_is_no_further_off_than_torchs_flash_attention() -> None:
    low = [x.detach().bfloat16().requires_grad_() for x in heads(4, 2, 2, 96, 32, 32, torch.float32)]
    exact = [x.detach().double().requires_grad_() for x in low]
    mask = documents(4, 96)[1]
    wanted, theirs = torchs(*exact, mask), torchs(*low, mask)
    grad = torch.randn_like(theirs)
    out, grads = by_kernel(grad, *low, documents(4, 96)[0])
    of_torch = (theirs, *torch.autograd.grad(theirs, low, grad))
    right = (wanted, *torch.autograd.grad(wanted, exact, grad.double()))
    for ours, torchs_own, best in zip((out, *grads), of_torch, right, strict=True):
        assert (ours.double() - best).abs().mean() <= 1.1 * (torchs_own.double() - best).abs().mean()


def test_heads_may_lie_anywhere_and_share_memory() -> None:
    qkv = torch.randn(3, 40, 5 * 8, dtype=torch.bfloat16)  # as they come out of one product
    apart = qkv.unflatten(2, (5, 8)).split([3, 1, 1], dim=2)
    one_key = torch.randn(3, 40, 1, 8, dtype=torch.bfloat16)
    q, k, v = apart[0], one_key.expand(-1, -1, 3, -1), apart[2].expand(-1, -1, 3, -1)
    together = attention(*(x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)), None)
    assert torch.equal(attention(q, k, v, None), together)
    grad = torch.randn(3, 3, 40, 8, dtype=torch.bfloat16).transpose(1, 2)
    leaf = q.detach().requires_grad_()
    grads = [torch.autograd.grad(attention(leaf, k, v, None), leaf, g)[0] for g in (grad, grad.contiguous())]
    assert torch.equal(*grads)


def test_huge_scores_neither_overflow_nor_spoil_the_rest() -> None:
    q, k, v = heads(1, 1, 1, 20, 8, 8, torch.float32)
    with torch.no_grad():
        k[0, 3] *= 1e18
    out, grads = by_kernel(torch.ones(1, 20, 1, 8), q, k, v, None)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:, :3], attention(q[:, :3], k[:, :3], v[:, :3], None))
    assert grads[2].isfinite().all()


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    q, k, v = (x.detach().requires_grad_() for x in heads(2, 2, 2, 6, 4, 4, torch.float32))
    torch.library.opcheck(torch.ops.engram.attention.default, (q, k, v, documents(2, 6)[0]))


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    q, k, v = (x.detach() for x in heads(1, 4, 2, 9, 8, 8, torch.float32))
    starts = torch.zeros(1, 9, dtype=torch.int64)
    for name, arguments in (
        ("k", (q, k[:, :4], v, None)),
        ("v", (q, k[:, :4], v[:, :4], None)),
        ("v", (q[:, :, :3], k, v, None)),
        ("starts", (q, k, v, starts[:, :8])),
    ):
        with pytest.raises(ValueError, match=f"shape of {name} is"):
            attention(*arguments)
