"""`lay_out_rows` for CUDA, in Triton, by counting (reference: engram/kernels/layout.py).

Three passes: how many copies each segment of them has for each expert; where its rows begin, summed over segments; and
where each copy goes, by how many before it in its segment have its expert. Nothing depends on the order of programs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram.kernels.layout import lay_out_reference, room_for
from engram.kernels.triton.launch import ceil_div

_SEGMENT, _STEP = 512, 32
_SEGMENTS, _EXPERTS, _MOST_EXPERTS = 64, 8, 4096


@triton.jit(do_not_specialize=["C"])
def _count_kernel(experts, counts, C, E: tl.constexpr, SEGMENT: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SEGMENT + tl.arange(0, SEGMENT)
    own = counts + tl.program_id(0).to(tl.int64) * E
    tl.atomic_add(own + tl.load(experts + i, mask=i < C, other=0), 1, mask=i < C, sem="relaxed")


@triton.jit(do_not_specialize=["G", "multiple"])
def _start_kernel(
    counts, load, ends, G, multiple, E: tl.constexpr, PADDED: tl.constexpr,
    EXPERTS: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Counts of G segments -> the first row of each, in their place; and the end of each expert's rows."""
    e, others = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), tl.arange(0, PADDED)
    sizes = tl.load(load + others, mask=others < E, other=0)
    sizes = (sizes + multiple - 1) // multiple * multiple
    upto = tl.sum(tl.where(others[None, :] <= e[:, None], sizes[None, :], 0), 1)
    tl.store(ends + e, upto, mask=e < E)
    start = tl.sum(tl.where(others[None, :] < e[:, None], sizes[None, :], 0), 1).to(tl.int32)
    g0 = G * 0
    while g0 < G:  # the interpreter takes no tensor for an end of a range
        g = g0 + tl.arange(0, SEGMENTS)
        at = counts + g.to(tl.int64)[:, None] * E + e[None, :]
        mask = (g < G)[:, None] & (e < E)[None, :]
        count = tl.load(at, mask=mask, other=0)
        tl.store(at, start[None, :] + tl.cumsum(count, 0) - count, mask=mask)
        start += tl.sum(count, 0)
        g0 += SEGMENTS


@triton.jit(do_not_specialize=["C"])
def _place_kernel(experts, starts, place, copy, C, E: tl.constexpr, SEGMENT: tl.constexpr, STEP: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * SEGMENT
    within = tl.arange(0, SEGMENT)
    valid = first + within < C
    expert = tl.load(experts + first + within, mask=valid, other=0).to(tl.int32)
    before = tl.zeros([SEGMENT], tl.int32)
    for j0 in range(0, SEGMENT, STEP):
        j = j0 + tl.arange(0, STEP)
        other = tl.load(experts + first + j, mask=first + j < C, other=-1).to(tl.int32)
        same = (other[:, None] == expert[None, :]) & (j[:, None] < within[None, :])
        before += tl.sum(same.to(tl.int32), 0)
    start = tl.load(starts + tl.program_id(0).to(tl.int64) * E + expert, mask=valid, other=0)
    row = (start + before).to(tl.int64)
    tl.store(place + first + within, row, mask=valid)
    tl.store(copy + row, first + within, mask=valid)


def lay_out_triton(experts: Tensor, load: Tensor, multiple: int, worst: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `lay_out_reference`, which it leaves to itself where the number of rows depends on data."""
    C, E = experts.numel(), len(load)
    P = room_for(C, E, multiple)
    if not (worst or multiple == 1) or not C or E > _MOST_EXPERTS or P >= 2**31:
        return lay_out_reference(experts, load, multiple, worst)
    experts, load, G = experts.contiguous(), load.contiguous(), ceil_div(C, _SEGMENT)
    counts = torch.zeros(G, E, dtype=torch.int32, device=experts.device)
    place, ends = torch.empty_like(experts), torch.empty_like(load)
    copy = experts.new_full((P,), C) if multiple > 1 else experts.new_empty(P)
    _count_kernel[(G,)](experts, counts, C, E=E, SEGMENT=_SEGMENT, num_warps=4)
    _start_kernel[(ceil_div(E, _EXPERTS),)](
        counts, load, ends, G, multiple,
        E=E, PADDED=triton.next_power_of_2(E), EXPERTS=_EXPERTS, SEGMENTS=_SEGMENTS, num_warps=4,
    )  # fmt: skip
    _place_kernel[(G,)](experts, counts, place, copy, C, E=E, SEGMENT=_SEGMENT, STEP=_STEP, num_warps=8)
    return place, copy, ends
