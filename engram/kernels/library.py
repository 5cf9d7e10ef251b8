"""The namespace `torch.ops.engram`, and how an operator gets into it and gets its derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("engram", "DEF")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any], *, replayed: bool = True) -> Any:
    """Register `name(arguments) -> results` and return the operator.

    `reference` runs on every device that has no kernel of its own; `fake` makes outputs of the right shapes, for the
    compiler. An operator that is not `replayed` changes what Python holds, or lets the host wait for the device: a
    compiler leaves it out of CUDA graphs, which would do neither again.
    """
    name = schema.split("(", 1)[0]
    tags = (torch.Tag.pt2_compliant_tag,) if replayed else (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    LIBRARY.define(schema, tags=tags)
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"engram::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.engram, name).default


class _Unpacked:
    """The context of a backward pass with its saved tensors, which checkpointing lets nobody unpack twice."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Final(torch.autograd.Function):
    """The first `n` of some tensors: gradients that may not be differentiated by what they were made of, the others."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, n: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tensors[:n]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"engram::{ctx.name} is differentiable once")


def differentiate(name: str, backward: Callable[..., tuple[Any, ...]], setup: Callable[..., None]) -> None:
    """Register the derivative of an operator: `backward`, and `setup`, which saves for it all that this depends on.

    It is not differentiable again: gradients made with `create_graph` raise RuntimeError when they are differentiated.
    """

    def once(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            found = backward(ctx, *grads)
        return _Final.apply(name, len(found), *found, *ctx.saved_tensors, *grads)

    torch.library.register_autograd(f"engram::{name}", once, setup_context=setup, lib=LIBRARY)
