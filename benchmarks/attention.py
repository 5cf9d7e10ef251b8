"""The backbone's attention on the CPU against torch's `scaled_dot_product_attention`, causal, each in its own layout.

`python benchmarks/attention.py`
"""

from __future__ import annotations

import argparse
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from harness import Side, Table, alternate, finish
from torch import Tensor

from engram.kernels import attention, load_kernels
from engram.training.environment import prepare_process


class Size(NamedTuple):
    """B sequences of T positions; h query heads and g of keys and values, of c numbers each."""

    B: int
    T: int
    h: int
    g: int
    c: int


SIZES = (Size(32, 128, 2, 2, 32), Size(16, 256, 4, 2, 24), Size(4, 1024, 8, 2, 64), Size(1, 4096, 8, 8, 128))


class Batch(NamedTuple):
    """Queries, keys, values and the gradient of the result, heads before positions for torch, and after them for us."""

    ours: tuple[Tensor, ...]
    theirs: tuple[Tensor, ...]


def draw(size: Size, dtype: torch.dtype) -> Batch:
    """Fresh tensors, each contiguous in its side's layout."""
    heads = (size.h, size.g, size.g, size.h)
    made = tuple(torch.randn(size.B, size.T, n, size.c).to(dtype) for n in heads)
    turned = tuple(x.transpose(1, 2).contiguous() for x in made)
    for x in (*made[:3], *turned[:3]):
        x.requires_grad_()
    return Batch(made, turned)


def ours(batch: Batch, backward: bool) -> None:
    q, k, v, grad = batch.ours
    _finish(attention(q, k, v, None), batch.ours[:3], grad, backward)


def theirs(batch: Batch, backward: bool) -> None:
    q, k, v, grad = batch.theirs
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])
    _finish(y, batch.theirs[:3], grad, backward)


def _finish(y: Tensor, leaves: tuple[Tensor, ...], grad: Tensor, backward: bool) -> None:
    if backward:
        torch.autograd.grad(y, leaves, grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two sizes and few rounds")
    arguments = parser.parse_args()
    prepare_process()
    load_kernels()
    torch.manual_seed(0)
    table = Table("Causal attention", ["type", *Size._fields, "pass"], ["ours", "torch"])
    for dtype in (torch.bfloat16, torch.float32):
        for size in SIZES[: 2 if arguments.quick else None]:
            for name in ("forward", "both"):
                sides: dict[str, Side | str] = {
                    "ours": functools.partial(ours, backward=name == "both"),
                    "torch": functools.partial(theirs, backward=name == "both"),
                }
                one = functools.partial(draw, size, dtype)
                seconds = alternate(sides, one, rounds=7 if arguments.quick else 41)
                table.add((str(dtype).removeprefix("torch."), *size, name), seconds)
    finish("attention", [table], arguments=vars(arguments))


if __name__ == "__main__":
    main()
