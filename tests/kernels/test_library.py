"""What all operators have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import engram.memory.offloaded  # noqa: F401  (the last to define operators)
from engram.backbone import mean_loss
from engram.config import MoEConfig
from engram.experts import MoE


class Zeros(TorchDispatchMode):
    """The shapes of all tensors of zeros that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "zeros" in func.name():
            self.shapes.append(result.shape)
        return result


def test_no_zeros_are_made_for_what_has_no_gradient() -> None:
    N, K, d, width, V = 5, 2, 8, 12, 31
    layer = MoE(MoEConfig(d_model=d, n_experts=4, top_k=K, width=width))
    head = torch.randn(V, d, requires_grad=True)
    loss = mean_loss(layer(torch.randn(1, N, d)), head, torch.randint(0, V, (1, N)))
    with Zeros() as zeros:
        loss.backward()
    assert (V, d) not in zeros.shapes
    assert (N * K, 2 * width) not in zeros.shapes


def test_no_graph_records_what_changes_python_or_waits() -> None:
    names = [name.removeprefix("engram::") for name in torch._C._dispatch_get_all_op_names() if "engram::" in name]
    unsafe = {name for name in names if torch.Tag.cudagraph_unsafe in getattr(torch.ops.engram, name).default.tags}
    assert unsafe == {"keep_row_gradient", "read_offloaded"}


class Cut(torch.autograd.Function):
    """Passes a tensor on, and no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> None:
        return None


def test_a_gradient_that_does_not_come_goes_no_further() -> None:
    layer = MoE(MoEConfig(d_model=8, n_experts=4, top_k=2, width=12))
    head = torch.randn(31, 8, requires_grad=True)
    x = torch.randn(1, 5, 8, requires_grad=True)
    Cut.apply(mean_loss(Cut.apply(layer(x)), head, torch.randint(0, 31, (1, 5)))).backward()
    layer(Cut.apply(x)).sum().backward()
    assert x.grad is None or not x.grad.any()
