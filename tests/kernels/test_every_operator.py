"""What holds for all operators: they are differentiable once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

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
