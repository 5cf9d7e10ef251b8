"""The product of groups of tokens with their experts: lay tokens out by expert, multiply, put them back.

Where a device has a kernel for these sizes, that does it all. Elsewhere a token has K known places in the layout, so
moves are gathers both ways, forward and backward, and nothing is scattered or dropped; which product is used, and how
far groups are padded, was settled by timing: see `_product_for`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engram.kernels import grouped_swiglu as by_kernel
from engram.kernels import has_grouped_swiglu, lay_out_rows, swiglu


class Layout(NamedTuple):
    """Where each token's K copies stand among P rows ordered by expert, each group padded to a multiple of `multiple`.

    place_NK: row of a copy. copy_P: which copy (n * K + k) stands in a row, N * K in padding. ends_E: end of each
    expert's rows; rows after the last end are padding too.
    """

    place_NK: Tensor
    copy_P: Tensor
    ends_E: Tensor
    multiple: int

    @property
    def token_P(self) -> Tensor:
        """The token in each row; padding holds some token, with weight 0."""
        N, K = self.place_NK.shape
        return self.copy_P.clamp_max(N * K - 1) // K


def lay_out(experts_NK: Tensor, load_E: Tensor, multiple: int) -> Layout:
    """The layout of the copies of tokens, given their experts `[N, K]` and how many each expert has."""
    # Elsewhere than on the CPU room for the worst case, so that the host need not wait to know how much.
    worst = experts_NK.device.type != "cpu" or torch.compiler.is_compiling()
    return Layout(*lay_out_rows(experts_NK, load_E, multiple, worst), multiple)


class _Spread(torch.autograd.Function):
    """Tokens `[N, D]` -> rows `[P, D]`. The adjoint of `_Collect`."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_P: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(place_NK)
        return x_ND.index_select(0, token_P)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None, None]:
        (place_NK,) = ctx.saved_tensors
        return F.embedding_bag(place_NK, grad_PD, mode="sum"), None, None


class _Collect(torch.autograd.Function):
    """Rows `[P, D]` -> the sum of each token's K rows `[N, D]`. The adjoint of `_Spread`, which padding rows miss."""

    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, token_P: Tensor, place_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_P)
        return F.embedding_bag(place_NK, y_PD, mode="sum")  # a gather and a sum in one pass

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:
        (token_P,) = ctx.saved_tensors
        return grad_ND.index_select(0, token_P), None, None


Product = Callable[[Tensor, Tensor, Layout], Tensor]


def grouped_product(x_PD: Tensor, weight_EDF: Tensor, layout: Layout) -> Tensor:
    """Each group of rows times its expert's matrix, `[P, D]` -> `[P, F]`; rows after the last group are left unset."""
    return F.grouped_mm(x_PD, weight_EDF, offs=layout.ends_E.int())


def blockwise_product(x_PD: Tensor, weight_EDF: Tensor, layout: Layout) -> Tensor:
    """As `grouped_product`, as one batched product of blocks of `multiple` rows, each with a copy of its matrix."""
    G, R = len(x_PD) // layout.multiple, layout.multiple
    starts_G = torch.arange(0, G * R, R, device=x_PD.device)
    expert_G = torch.searchsorted(layout.ends_E, starts_G, right=True).clamp_max(len(weight_EDF) - 1)
    return torch.bmm(x_PD.view(G, R, -1), weight_EDF.index_select(0, expert_G)).flatten(0, 1)


# Experts up to this many weights in w_gate_up multiply faster in bfloat16 as one batched product than group by group.
_SMALL_EXPERT = 2**15


def _product_for(x_ND: Tensor, w_gate_up: Tensor, mean_load: int) -> tuple[Product, int]:
    """The faster product for these sizes where the kernel is not to be used, and the multiple of rows that it wants
    groups padded to.

    On the CPU `grouped_mm` is a loop, and in bfloat16 oneDNN builds a new primitive for each new number of rows: groups
    that were not padded took up to 10x as long. Small experts then still spend most of their time between products:
    one batched product took 0.3 to 0.7 of it, and more than all of it from d * 2F = 36,000 up.
    """
    _, D, two_F = w_gate_up.shape
    on_cpu, compiling = x_ND.device.type == "cpu", torch.compiler.is_compiling()
    fits_16_bytes = all(n * x_ND.element_size() % 16 == 0 for n in (D, two_F // 2))  # grouped_mm's rule for strides
    if fits_16_bytes and x_ND.dtype == torch.bfloat16:
        if not on_cpu:
            return grouped_product, 8
        if D * two_F > _SMALL_EXPERT:
            return grouped_product, 64 if compiling else 16 if mean_load < 128 else 32
    if compiling:  # whose graphs must not depend on how many tokens there are
        return blockwise_product, 64
    half_load = max(mean_load // 2, 1)
    return blockwise_product, min(max(2 ** (half_load.bit_length() - 1), 16), 256)


def grouped_swiglu(
    x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, load_E: Tensor, w_gate_up: Tensor, w_down: Tensor
) -> Tensor:
    """sum_k weight_k * down_e(silu(gate_e x) * (up_e x)) over each token's K experts e, `[N, D]`.

    Args:
        x_ND: tokens, in the type to multiply in; weights may be wider.
        experts_NK, weights_NK: chosen experts and their weights.
        load_E: how often each expert was chosen.
        w_gate_up: `[E, D, 2F]`, gate first. w_down: `[E, F, D]`.
    """
    if has_grouped_swiglu(x_ND.device.type, x_ND.dtype, w_down.shape[2], w_down.shape[1]):
        layout = lay_out(experts_NK, load_E, 1)
        return by_kernel(x_ND, weights_NK, layout.place_NK, layout.copy_P, layout.ends_E, w_gate_up, w_down)
    w_gate_up, w_down = w_gate_up.to(x_ND.dtype), w_down.to(x_ND.dtype)
    product, multiple = _product_for(x_ND, w_gate_up, experts_NK.numel() // len(load_E))
    layout = lay_out(experts_NK, load_E, multiple)
    token_P = layout.token_P
    # Weighting the hidden layer, the narrowest, costs least; padding gets weight 0, so that it adds to no gradient.
    weights = torch.cat([weights_NK.flatten(), weights_NK.new_zeros(1)])
    x_PD = _Spread.apply(x_ND, token_P, layout.place_NK)
    h_PF = swiglu(product(x_PD, w_gate_up, layout), weights.index_select(0, layout.copy_P))
    return _Collect.apply(product(h_PF, w_down, layout), token_P, layout.place_NK)
