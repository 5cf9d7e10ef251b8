"""What holds for all operators: they are differentiable once, and references lay results out as a compiler was told."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from engram import kernels
from engram.backbone import mean_loss

N, E, K, D, F, V = 5, 3, 2, 6, 4, 7
B, T, M, H = 2, 5, 3, 4


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers whose axes lie in memory in reverse order, so that no two are in the order of a fresh tensor."""
    back = tuple(reversed(range(len(shape))))
    return torch.randn(*shape, dtype=dtype).permute(back).contiguous().permute(back).requires_grad_()


def routed() -> tuple[Tensor, Tensor, Tensor]:
    experts = torch.stack([torch.randperm(E)[:K] for _ in range(N)])
    return kernels.lay_out_rows(experts, experts.flatten().bincount(minlength=E), 1, False)


def fuse(hidden: Tensor, kv: Tensor, *weights: Tensor) -> Tensor:
    return kernels.fuse_memory(hidden, kv, *weights, eps=1e-5, squash=False).out


def route(logits: Tensor) -> Tensor:
    return kernels.route(logits, torch.zeros(E), K, sigmoid=True, normalize=True, scale=1.0).weights


ANGLES = torch.randn(T, H // 2)
FUSION = ((B, T, M, D), (B, T, (M + 1) * D), (M, D), (M, D), (M, D), (2, M, D))
OPERATORS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "attention": (lambda q, k, v: kernels.attention(q, k, v, None), ((B, T, 4, H), (B, T, 2, H), (B, T, 2, H))),
    "fuse_memory": (fuse, FUSION),
    "grouped_swiglu": (
        lambda x, weights, *w: kernels.grouped_swiglu(x, weights, *routed(), *w),
        ((N, D), (N, K), (E, D, 2 * F), (E, F, D)),
    ),
    "linear": (kernels.linear, ((20, D), (F, D), (F,))),
    "mean_cross_entropy": (lambda h, w: mean_loss(h, w, torch.randint(V, (B, T))), ((B, T, D), (V, D))),
    "norm_rotate": (lambda x, w: kernels.norm_rotate(x, w, ANGLES.cos(), ANGLES.sin(), 1e-5), ((B, T, 2, H), (H,))),
    "read_branches": (kernels.read_branches, ((N, M, D), (N, M))),
    "rms_norm": (lambda x, weight: kernels.rms_norm(x, weight, 1e-5), ((N, D), (D,))),
    "route": (route, ((N, E),)),
    "router_logits": (lambda x, weight: kernels.router_logits(x, weight, False), ((N, D), (E, D))),
    "sinkhorn": (lambda logits: kernels.sinkhorn(logits, 3), ((N, M, M),)),
    "swiglu": (kernels.swiglu, ((N, 2 * F), (N,))),
    "write_branches": (kernels.write_branches, ((N, M, D), (N, D), (N, M), (N, M, M))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_second_derivative_is_refused_by_name(name: str) -> None:
    operator, shapes = OPERATORS[name]
    inputs = [leaf(*shape) for shape in shapes]
    gradients = torch.autograd.grad(operator(*inputs).sum(), inputs, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError, match=f"engram::{name} is differentiable once"):
            gradient.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=f"engram::{name} is differentiable once"):
            torch.autograd.grad(operator(*inputs).square().sum() + gradient.sum(), inputs, retain_graph=True)


def test_every_operator_with_a_derivative_is_among_them() -> None:
    names = {name.removeprefix("engram::") for name in torch._C._dispatch_get_all_op_names() if "engram::" in name}
    own = {n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"engram::{n}", "Autograd")}
    assert own - {"read_rows"} == set(OPERATORS)  # the last is for compiled code, which has no second derivatives


def test_gradients_that_could_be_differentiated_are_the_same() -> None:
    x, weight = leaf(N, D, dtype=torch.float64), leaf(D, dtype=torch.float64)
    loss = kernels.rms_norm(x, weight, 1e-5).square().sum()
    plain = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, weight), create_graph=True), plain)


def reference(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(f"engram.kernels.{module}"), f"{name}_reference")


def cases(dtype: torch.dtype, other: torch.dtype) -> list[tuple[str, str, tuple[Any, ...]]]:
    """The operators of which each module has references, and inputs in two types."""

    def own(*shape: int) -> Tensor:
        return leaf(*shape, dtype=dtype).detach()

    def mixed(*shape: int) -> Tensor:
        return leaf(*shape, dtype=other).detach()

    q, k, v = mixed(B, T, 4, H), mixed(B, T, 2, H), own(B, T, 2, H)
    attended = reference("causal_attention", "attention")(q, k, v, None)
    memory = [own(*shape) for shape in FUSION]
    no_past, settings = (None, None, None), (1e-5, False, 1, True)
    out, *kept = reference("fusion", "fuse_memory")(*memory, *no_past, *settings)
    experts = own(N, D), own(N, K), *routed(), own(E, D, 2 * F), own(E, F, D)
    x, norm, angles = own(B, T, 2, H), mixed(H), (mixed(T, H // 2), mixed(T, H // 2))
    inverse = torch.rand(B * T * 2, dtype=torch.promote_types(dtype, torch.float32))
    logits, chosen = leaf(N, E).detach(), torch.randint(E, (K, N)).T
    branches = own(N, M, D), mixed(N, D), mixed(N, M), mixed(N, M, M)
    matrices, halves, weights = own(N, M, M), own(N, B, 2 * F), mixed(N, B)
    return [
        ("causal_attention", "attention", (q, k, v, None)),
        ("causal_attention", "attention_backward", (own(*attended[0].shape), q, k, v, None, *attended)),
        ("fusion", "fuse_memory", (*memory, *no_past, *settings)),
        ("fusion", "fuse_memory_backward", (own(*out.shape), None, *memory, *no_past, *kept, *settings)),
        ("grouped_swiglu", "grouped_swiglu", experts),
        ("grouped_swiglu", "grouped_swiglu_backward", (own(N, D), *experts, own(N * K, 2 * F))),
        ("norm", "norm_rotate", (x, norm, *angles, 1e-5)),
        ("norm", "norm_rotate", (x, None, *angles, 1e-5)),
        ("norm", "norm_rotate_backward", (x, x, norm, *angles, inverse)),
        ("norm", "norm_rotate_backward", (x, x, None, *angles, inverse[:0])),
        ("norm", "rms_norm", (x, norm, 1e-5)),
        ("norm", "rms_norm", (own(H), norm, 1e-5)),
        ("norm", "rms_norm_backward", (x, x, norm, inverse)),
        ("norm", "rms_norm_backward", (own(H), own(H), norm, inverse[:1])),
        ("routing", "route", (logits, torch.zeros(E), K, True, True, 1.0)),
        ("routing", "route_backward", (leaf(N, K).detach(), logits, chosen, True, True, 1.0)),
        ("routing", "route_backward", (leaf(N, K).detach(), logits, chosen, False, True, 1.0)),
        ("routing", "router_logits", (own(N, D), mixed(E, D), False)),
        ("routing", "router_logits_backward", (inverse.new_ones(E, N).T, own(N, D), mixed(E, D), False)),
        ("sinkhorn", "read_branches", (branches[0], branches[2])),
        ("sinkhorn", "read_branches_backward", (own(N, D), branches[0], branches[2])),
        ("sinkhorn", "sinkhorn", (matrices, 3)),
        ("sinkhorn", "sinkhorn_backward", (matrices, matrices, 3)),
        ("sinkhorn", "write_branches", branches),
        ("sinkhorn", "write_branches_backward", (own(N, M, D), *branches)),
        ("swiglu", "swiglu", (halves, weights)),
        ("swiglu", "swiglu_backward", (own(N, B, F), halves, weights)),
        ("swiglu", "swiglu_backward", (own(N, B, F), halves, None)),
    ]


def laid_out(tensors: Tensor | tuple[Tensor, ...]) -> list[Any]:
    tensors = (tensors,) if isinstance(tensors, Tensor) else tensors
    return [(x.shape, x.stride(), x.dtype) for x in tensors]


TYPES = [(torch.float32, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(("dtype", "other"), TYPES, ids=str)
def test_a_references_results_lie_in_memory_as_a_compiler_was_told(dtype: torch.dtype, other: torch.dtype) -> None:
    for module, name, inputs in cases(dtype, other):
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
            told = laid_out(getattr(torch.ops.engram, name)(*fakes))
        assert laid_out(reference(module, name)(*inputs)) == told, name
