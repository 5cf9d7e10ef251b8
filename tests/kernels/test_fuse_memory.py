"""The fused memory operator: its backward against autograd of the equations, its C++ kernel against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels import fuse_memory, load_native
from engram.kernels.fusion import fuse_memory_backward_reference, fuse_memory_reference

NAMES = ("hidden", "kv", "query_norm", "key_norm", "conv_norm", "conv_weight")


def inputs(
    B: int = 2, T: int = 9, M: int = 2, D: int = 8, taps: int = 3, dilation: int = 2, seed: int = 0, past: int = 0
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    given_ = {
        "hidden": normal(B, T, M, D),
        "kv": normal(B, T, (M + 1) * D),
        "query_norm": 1 + 0.3 * normal(M, D),
        "key_norm": 1 + 0.3 * normal(M, D),
        "conv_norm": 1 + 0.3 * normal(M, D) if taps else None,
        "conv_weight": normal(taps, M, D) if taps else None,
        "documents": None,
        "past_values": normal(B, past, D) if past else None,
        "past_scales": torch.rand(B, past, M, generator=g, dtype=torch.float64) if past else None,
    }
    return given_ | {"eps": 1e-5, "squash": True, "dilation": dilation, "residual": False}


def cast(given_: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    is_float = {k: isinstance(v, Tensor) and v.is_floating_point() for k, v in given_.items()}
    return {k: v.to(dtype) if is_float[k] else v for k, v in given_.items()}


def by_loops(a: dict[str, Any]) -> Tensor:
    """Y for one token, one branch, one tap at a time, u made and normed as the paper writes it."""
    (B, T, M, D), documents = a["hidden"].shape, a["documents"]
    past = 0 if a["past_values"] is None else a["past_values"].shape[1]
    docs = torch.zeros(B, past + T, dtype=torch.int64) if documents is None else documents

    def normed(x: Tensor) -> Tensor:
        return x / (x.square().mean() + a["eps"]).sqrt()

    u = torch.zeros(B, T, M, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            for m in range(M):
                q = normed(a["hidden"][b, t, m]) * a["query_norm"][m]
                k = normed(a["kv"][b, t, m * D : (m + 1) * D]) * a["key_norm"][m]
                g = (q @ k) / D**0.5
                if a["squash"]:
                    g = g.sign() * g.abs().clamp_min(1e-6).sqrt()
                if docs[b, past + t] >= 0:
                    u[b, t, m] = torch.sigmoid(g) * a["kv"][b, t, M * D :]
    y = u.clone()
    taps = 0 if a["conv_weight"] is None else len(a["conv_weight"])
    for b in range(B):
        for t in range(T):
            for m in range(M):
                z = torch.zeros(D, dtype=torch.float64)
                for j in range(taps):
                    then = t - (taps - 1 - j) * a["dilation"]
                    if then < -past or docs[b, past + then] != docs[b, past + t]:
                        continue
                    if then >= 0:
                        x = normed(u[b, then, m])
                    else:
                        x = a["past_scales"][b, past + then, m] * a["past_values"][b, past + then]
                    z += a["conv_weight"][j, m] * a["conv_norm"][m] * x
                y[b, t, m] += z * torch.sigmoid(z)
    return a["hidden"] + y if a["residual"] else y


def with_documents(a: dict[str, Any], seed: int) -> dict[str, Any]:
    (B, T), past = a["hidden"].shape[:2], 0 if a["past_values"] is None else a["past_values"].shape[1]
    g = torch.Generator().manual_seed(seed)
    changes = torch.rand(B, past + T, generator=g) < 0.3
    documents = changes.long().cumsum(1)
    documents[torch.rand(B, past + T, generator=g) < 0.15] = -1  # padding
    return a | {"documents": documents}


shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "T": st.integers(1, 12),
        "M": st.integers(1, 4),
        "D": st.integers(1, 19),
        "taps": st.integers(0, 4),
        "dilation": st.integers(1, 4),
        "seed": st.integers(0, 1000),
        "past": st.sampled_from([0, 0, 5, 12]),
    }
)
options = st.fixed_dictionaries({"squash": st.booleans(), "residual": st.booleans()})


@settings(max_examples=60, deadline=None)
@given(shapes, options, st.booleans())
def test_reference_and_kernel_follow_the_papers_equations(shape: Any, option: Any, packed: bool) -> None:
    load_native()
    a = inputs(**shape) | option
    a = with_documents(a, shape["seed"]) if packed else a
    expected = by_loops(a)
    torch.testing.assert_close(fuse_memory_reference(**a)[0], expected)
    torch.testing.assert_close(fuse_memory(**a).out, expected)


@settings(max_examples=60, deadline=None)
@given(shapes, options, st.booleans(), st.booleans())
def test_both_backwards_are_the_derivative_of_the_equations(
    shape: Any, option: Any, packed: bool, through_gates: bool
) -> None:
    load_native()
    a = inputs(**shape) | option
    a = with_documents(a, shape["seed"]) if packed else a
    leaves = {name: a[name].requires_grad_() for name in NAMES if a[name] is not None}
    g = torch.Generator().manual_seed(1)
    out, alpha, stats = fuse_memory_reference(**a)
    grad_out = torch.randn(out.shape, generator=g, dtype=torch.float64)
    grad_alpha = torch.randn(alpha.shape, generator=g, dtype=torch.float64) if through_gates else None
    outputs, grads = ([out, alpha], [grad_out, grad_alpha]) if through_gates else ([out], [grad_out])
    expected = torch.autograd.grad(outputs, list(leaves.values()), grads)

    settings_ = {k: a.pop(k) for k in ("eps", "squash", "dilation", "residual")}
    by_hand = fuse_memory_backward_reference(
        grad_out, grad_alpha, *a.values(), alpha.detach(), stats.detach(), *settings_.values()
    )
    fused = fuse_memory(**a, **settings_)
    by_kernel = torch.autograd.grad([fused.out, fused.alpha][: len(outputs)], list(leaves.values()), grads)
    for name, want, ours, kernel in zip(leaves, expected, by_hand, by_kernel, strict=False):
        torch.testing.assert_close(ours, want, msg=lambda m, name=name: f"{name}, reference: {m}")
        torch.testing.assert_close(kernel, want, msg=lambda m, name=name: f"{name}, kernel: {m}")


@pytest.mark.parametrize(
    ("hidden", "kv"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16,) * 2]
)
@pytest.mark.parametrize("taps", [0, 4])
def test_narrow_types_are_computed_in_float32(hidden: torch.dtype, kv: torch.dtype, taps: int) -> None:
    load_native()
    a = cast(inputs(B=2, T=40, M=2, D=48, taps=taps, dilation=3), torch.float32)
    a["hidden"], a["kv"] = a["hidden"].to(hidden), a["kv"].to(kv)
    exact = {k: v.double() if isinstance(v, Tensor) else v for k, v in a.items()}
    leaves = [a[n].requires_grad_() for n in NAMES if a[n] is not None]
    wide_leaves = [exact[n].detach().requires_grad_() for n in NAMES if a[n] is not None]
    exact |= dict(zip([n for n in NAMES if a[n] is not None], wide_leaves, strict=True))
    out = fuse_memory(**a).out
    want = fuse_memory(**exact).out
    assert out.dtype == hidden
    tolerance = {"rtol": 2**-7, "atol": 2e-2} if torch.bfloat16 in (hidden, kv) else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(out.double(), want, **tolerance)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(hidden)
    ours = torch.autograd.grad(out, leaves, grad)
    theirs = torch.autograd.grad(want, wide_leaves, grad.double())
    for x, y, leaf in zip(ours, theirs, leaves, strict=True):
        assert x.dtype == leaf.dtype
        scale = y.abs().max().clamp_min(1e-3)
        torch.testing.assert_close(x.double() / scale, y / scale, rtol=tolerance["rtol"], atol=tolerance["atol"])
    assert out.float().isfinite().all()


@pytest.mark.parametrize(("hidden", "kv"), [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)])
def test_types_without_a_kernel_go_up_to_one_that_has(hidden: torch.dtype, kv: torch.dtype) -> None:
    a = cast(inputs(), torch.float32)
    a["hidden"], a["kv"] = a["hidden"].to(hidden), a["kv"].to(kv)
    wide = cast(a, torch.float32)
    out = fuse_memory(**a).out
    assert out.dtype == hidden
    torch.testing.assert_close(out.float(), fuse_memory(**wide).out, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    ("now", "before"),
    [
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
def test_the_past_is_taken_in_any_type(now: torch.dtype, before: torch.dtype) -> None:
    """As memory keeps it whose own type is not that of the hidden states, or of autocast."""
    load_native()
    a = cast(inputs(past=12), torch.float32)
    a["hidden"], a["kv"], a["past_values"] = a["hidden"].to(now), a["kv"].to(now), a["past_values"].to(before)
    out = fuse_memory(**a).out
    assert out.dtype == now
    tolerance = {torch.float64: 1e-12, torch.float16: 2**-10, torch.bfloat16: 2**-7}[now]
    expected = fuse_memory(**cast(a, torch.float64)).out
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_gates_of_padding_are_told_but_not_used() -> None:
    a = inputs() | {"documents": torch.full((2, 9), -1)}
    fused = fuse_memory(**a)
    assert fused.out.abs().max() == 0
    assert fused.scales.abs().max() == 0
    assert (fused.alpha > 0).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_number_of_threads_changes_nothing_but_rounding(threads: int) -> None:
    a = cast(inputs(B=4, T=64, M=2, D=96), torch.float32)
    weight = a["conv_weight"].requires_grad_()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        grads = [torch.autograd.grad(fuse_memory(**a).out.square().sum(), weight)[0] for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*grads)
    exact = fuse_memory_reference(**a)[0].square().sum()
    torch.testing.assert_close(grads[0], torch.autograd.grad(exact, weight)[0], rtol=1e-4, atol=1e-3)


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    a = inputs()
    arguments = [a[k].requires_grad_() if k in NAMES else a[k] for k in a]
    torch.library.opcheck(torch.ops.engram.fuse_memory.default, arguments)


def test_gradients_stand_where_weights_do_in_memory_and_have_their_types() -> None:
    """Weights that are views of others, or of unlike types."""
    load_native()
    a = cast(inputs(M=2, D=4), torch.float32)
    kept = {name: a[name] for name in NAMES[2:]}
    same = {name: x.clone().requires_grad_() for name, x in kept.items()}
    turned = {name: x.movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_() for name, x in kept.items()}
    types = dict(zip(NAMES[2:], (torch.float32, torch.float64, torch.float64, torch.bfloat16), strict=True))
    exact = {name: x.to(torch.bfloat16).to(types[name]).requires_grad_() for name, x in kept.items()}
    wanted, by_strides, by_types, by_type = (
        torch.autograd.grad(fuse_memory(**a | weights).out.square().sum(), list(weights.values()))
        for weights in (same, turned, exact, {n: x.detach().float().requires_grad_() for n, x in exact.items()})
    )
    for want, got in zip(wanted, by_strides, strict=True):
        torch.testing.assert_close(got, want)
    for want, got, dtype in zip(by_type, by_types, types.values(), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), want, rtol=2**-8, atol=1e-5)


WRONG = {
    "kv": torch.zeros(2, 5, 24),
    "query_norm": torch.zeros(8),
    "key_norm": torch.zeros(2, 7),
    "conv_norm": None,
    "conv_weight": torch.zeros(3, 8),
    "documents": torch.zeros(1, 9, dtype=torch.int64),
    "past_values": torch.zeros(2, 4, 8),
    "dilation": 0,
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_refused_by_name(name: str) -> None:
    load_native()
    with pytest.raises(ValueError, match=name):
        fuse_memory(**cast(inputs(), torch.float32) | {name: WRONG[name]})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_value_breaks_no_other_document_and_no_other_sequence(bad: float) -> None:
    load_native()
    a = cast(inputs(B=2, T=9, dilation=1), torch.float32)
    a["documents"] = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    a["kv"][0, 3] = bad
    a["hidden"][0, 3] = bad
    leaves = [a[name].requires_grad_() for name in ("hidden", "kv")]
    out = fuse_memory(**a).out
    others = torch.ones(2, 9, dtype=torch.bool)
    others[0, :4] = False
    assert out[others].isfinite().all()
    for grad in torch.autograd.grad(out, leaves, torch.ones_like(out)):
        assert grad[others].isfinite().all()
