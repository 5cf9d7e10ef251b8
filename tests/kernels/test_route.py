"""Routing: the C++ kernel against its reference, and both gradients against autograd of the equations."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.kernels import load_native, route, router_logits
from engram.kernels.products import products_in
from engram.kernels.routing import route_backward_reference, route_reference, scores_of

SETTINGS = ("sigmoid", "normalize", "scale")
cases = st.fixed_dictionaries(
    {"sigmoid": st.booleans(), "normalize": st.booleans(), "scale": st.sampled_from([1.0, 2.5])}
)


@settings(max_examples=80, deadline=None)
@given(cases, st.integers(1, 40), st.integers(1, 70), st.data())
def test_choice_weights_load_and_entropy_follow_the_equations(case: Any, N: int, E: int, data: st.DataObject) -> None:
    load_native()
    k = data.draw(st.integers(1, E))
    g = torch.Generator().manual_seed(N * 100 + E)
    logits = 3 * torch.randn(N, E, generator=g, dtype=torch.float64)
    bias = 0.1 * torch.randn(E, generator=g, dtype=torch.float64)
    routed, reference = (
        route(logits, bias, k, **case),
        route_reference(logits, bias, k, *(case[name] for name in SETTINGS)),
    )
    for name, ours, theirs in zip(routed._fields[2:], routed[2:], reference[2:], strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda m, name=name: f"{name}: {m}")
    for weights, experts in (routed[:2], reference[:2]):
        scores = scores_of(logits, case["sigmoid"])
        keys = scores + bias
        for n in range(N):
            chosen = experts[n].tolist()
            assert len(set(chosen)) == k
            left = [e for e in range(E) if e not in chosen]
            assert not left or keys[n, chosen].min() >= keys[n, left].max()
            expected = scores[n, chosen]
            expected = expected / expected.sum() if case["normalize"] else expected
            torch.testing.assert_close(weights[n], expected * case["scale"])
    share = scores / scores.sum(-1, keepdim=True)
    torch.testing.assert_close(routed.entropy, torch.special.entr(share).sum(-1).mean())
    assert routed.load.tolist() == torch.bincount(routed.experts.flatten(), minlength=E).tolist()


@settings(max_examples=60, deadline=None)
@given(cases, st.integers(1, 9), st.integers(1, 20), st.data())
def test_gradients_are_those_of_the_equations(case: Any, N: int, E: int, data: st.DataObject) -> None:
    load_native()
    k = data.draw(st.integers(1, E))
    g = torch.Generator().manual_seed(N * 100 + E)
    logits = torch.randn(N, E, generator=g, dtype=torch.float64).requires_grad_()
    routed = route(logits, torch.zeros(E, dtype=torch.float64), k, **case)
    chosen = scores_of(logits, case["sigmoid"]).gather(-1, routed.experts)
    weights = (chosen / chosen.sum(-1, keepdim=True) if case["normalize"] else chosen) * case["scale"]
    grad = torch.randn(N, k, generator=g, dtype=torch.float64)
    (expected,) = torch.autograd.grad(weights, logits, grad)
    (ours,) = torch.autograd.grad(routed.weights, logits, grad)
    torch.testing.assert_close(ours, expected)
    by_hand = route_backward_reference(grad, logits.detach(), routed.experts, *(case[name] for name in SETTINGS))
    torch.testing.assert_close(by_hand, expected)


def test_scores_of_nothing_give_weights_of_nothing() -> None:
    """Sigmoids that underflow: the weights' sum is floored, and no gradient is infinite."""
    load_native()
    logits = torch.full((2, 5), -200.0, requires_grad=True)
    routed = route(logits, torch.zeros(5), 2, sigmoid=True, normalize=True, scale=1.0)
    routed.weights.sum().backward()
    assert routed.weights.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("sigmoid", [True, False])
def test_float32_is_near_float64(sigmoid: bool) -> None:
    load_native()
    logits, bias = 4 * torch.randn(500, 67), torch.zeros(67)
    options: Any = {"sigmoid": sigmoid, "normalize": True, "scale": 1.0}
    low, high = route(logits, bias, 4, **options), route(logits.double(), bias.double(), 4, **options)
    torch.testing.assert_close(low.entropy.double(), high.entropy, rtol=1e-5, atol=0)
    assert torch.equal(low.load, high.load)
    torch.testing.assert_close(low.weights.sort().values.double(), high.weights.sort().values, rtol=1e-5, atol=1e-6)


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    arguments = (torch.randn(6, 9, requires_grad=True), torch.zeros(9), 2, True, True, 1.0)
    torch.library.opcheck(torch.ops.engram.route.default, arguments)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_logits_are_exact_and_their_gradients_as_near_as_asked(bfloat16: bool) -> None:
    x, weight = torch.randn(300, 64, requires_grad=True), torch.randn(12, 64, requires_grad=True)
    logits = router_logits(x, weight, bfloat16)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-4)
    grad = torch.randn(300, 12)
    ours = torch.autograd.grad(logits, (x, weight), grad)
    wanted = torch.autograd.grad(exact, (x, weight), grad.double())
    for got, want in zip(ours, wanted, strict=True):
        error = (got - want).norm() / want.norm()
        assert error < (2**-7 if bfloat16 else 1e-5)
    torch.library.opcheck(torch.ops.engram.router_logits.default, (x, weight, bfloat16))


def test_threads_that_round_factors_together_leave_the_setting_as_they_found_it() -> None:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, together = matmul.fp32_precision, threading.Barrier(2)
    left = threading.Event()

    def first() -> None:
        with products_in(True):
            together.wait()
        left.set()

    def second() -> None:
        with products_in(True):
            together.wait()
            left.wait()
            seen.append(matmul.fp32_precision)
        seen.append(matmul.fp32_precision)

    seen: list[str] = []
    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["bf16", before]


def test_logits_of_tokens_in_bfloat16_are_not_rounded() -> None:
    x, weight = torch.randn(30, 64).bfloat16().requires_grad_(), torch.randn(12, 64, requires_grad=True)
    logits = router_logits(x, weight, True)
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-4)
    got = torch.autograd.grad(logits.sum(), (x, weight))
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32]
    torch.library.opcheck(torch.ops.engram.router_logits.default, (x, weight, True))


@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("E", [4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_expert_is_chosen_twice_whatever_scores_and_bias(sigmoid: bool, E: int, dtype: torch.dtype) -> None:
    load_native()
    options: Any = {"sigmoid": sigmoid, "normalize": True, "scale": 1.0}
    logits, bias = torch.randn(6, E, dtype=dtype), torch.zeros(E, dtype=dtype)
    closed = torch.full((E,), -torch.inf, dtype=dtype)
    closed[E - 2] = 0
    broken = logits.clone()
    broken[1], broken[3, 0], broken[4, E - 1] = torch.nan, torch.nan, torch.nan
    for scores, shift in ((logits, closed), (broken, bias), (broken, closed)):
        routed = route(scores, shift, 3, **options)
        assert all(len(set(chosen)) == 3 for chosen in routed.experts.tolist())
        assert routed.load.sum() == 18
    assert (route(logits, closed, 3, **options).experts == E - 2).any(1).all()  # the open one first


def test_arguments_that_do_not_fit_are_refused_by_name() -> None:
    load_native()
    options: Any = {"sigmoid": True, "normalize": True, "scale": 1.0}
    with pytest.raises(ValueError, match="k is 6: allowed is 1 to 4"):
        route(torch.zeros(1, 4), torch.zeros(4), 6, **options)
    with pytest.raises(ValueError, match=r"bias is \[1\]: allowed is \[4\]"):
        route(torch.zeros(1, 4), torch.zeros(1), 2, **options)
