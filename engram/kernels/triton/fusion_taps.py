"""What a tap of the convolution sees, for the kernels of `fuse_memory` and its backward (engram/kernels/fusion.py).

A token's links are bits: j says that tap j finds a token of the same document in this call, 16 + j that it finds one in
the past, and 15 that the token is no padding. What has no link is not read.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZES = ["N", "T", "past"]  # compiled once for all values
SHOWN = tl.constexpr(1 << 15)
_LIMIT = 15  # taps, one for each bit of either half of 31


@triton.jit
def document_of(documents, n, valid, T, past):
    """The documents of tokens n, -1 where they are not valid; 0 for all without documents."""
    document = n * 0
    if documents is not None:
        now = (n // T).to(tl.int64) * (past + T) + past + n % T
        document = tl.load(documents + now, mask=valid, other=-1)
    return document


@triton.jit
def links_of(documents, document, n, valid, T, past, TAPS: tl.constexpr, DILATION: tl.constexpr):
    """The links of tokens n, which lie in `document`."""
    t = n % T
    now = (n // T).to(tl.int64) * (past + T) + past + t
    link = n * 0
    for j in tl.static_range(TAPS):
        back = (TAPS - 1 - j) * DILATION
        joined = valid & (t + past >= back)
        if documents is not None:
            joined = joined & (tl.load(documents + now - back, mask=joined, other=0) == document)
        link = link | tl.where(joined, tl.where(t >= back, 1 << j, 1 << (j + 16)), 0)
    return link


def left_to_torch(hidden: Tensor, kv: Tensor, conv_weight: Tensor | None) -> bool:
    """Whether no kernel is for this: float64, more taps than links, or tokens that 32 bits don't count."""
    many = conv_weight is not None and len(conv_weight) > _LIMIT
    return many or torch.float64 in (hidden.dtype, kv.dtype) or hidden.shape[:2].numel() >= 2**30
