"""Block sizes and grids that the Triton kernels share.

Each thread holds 4 numbers of a block, as many as one 16-byte load gives of float32: so blocks of bfloat16 and of
float32 are laid out alike, and nothing is moved between threads where they meet.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 128  # channels: 4 for each of a warp's 32 threads
_PROGRAMS_PER_PROCESSOR = 8
_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)


@triton.jit
def sigmoid(x):
    """In 4 instructions on NVIDIA's devices, within a few units in the last place of float32; Triton's own takes 12."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "{ mul.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0; add.f32 $0, $0, 0f3F800000; "
            "rcp.approx.ftz.f32 $0, $0; }",
            "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:  # noqa: RET505 -- Triton compiles what follows a return
        return 1.0 / (1.0 + tl.exp(-x))


class Tile(NamedTuple):
    """Blocks of tokens x branches (their number padded to a power of two) x channels, for 8 warps."""

    tokens: int
    branches: int
    width: int
    even: bool  # whether blocks of channels fill D exactly

    @classmethod
    def of(cls, M: int, D: int) -> Tile:
        width, branches = _width(D), triton.next_power_of_2(M)
        return cls(min(max(8 * WIDTH // (width * branches), 1), 16), branches, width, D % width == 0)


class Strip(NamedTuple):
    """A program's run of tokens, 4 or more at a time, and `parts` blocks of channels; and how many of both there are.

    For 4 warps. Weights and sums over tokens stay in registers over a run. Runs are as long as lets some programs for
    each processor of the device remain, and a power of two times `tokens`, since each length is compiled apart.
    """

    tokens: int
    width: int
    parts: int
    even: bool
    run: int
    blocks: int
    runs: int

    @classmethod
    def of(cls, N: int, D: int, device: torch.device, parts: int = 1, beside: int = 1) -> Strip:
        """For N tokens of D channels, and `beside` such programs for the same tokens and channels."""
        width = _width(D)
        parts = min(parts, ceil_div(D, width))
        blocks = ceil_div(D, width * parts)
        tokens = min(4 * WIDTH // width, 16)
        runs = max(_PROGRAMS_PER_PROCESSOR * _processors(device) // (blocks * beside), 1)
        run = tokens << max((N // (runs * tokens)).bit_length() - 1, 0)
        return cls(tokens, width, parts, D % (width * parts) == 0, run, blocks, ceil_div(N, run))


def _width(D: int) -> int:
    return max(min(WIDTH, triton.next_power_of_2(D)), 16)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def dense(x: Tensor | None) -> Tensor | None:
    """`x` in contiguous memory, which is what the kernels' pointer arithmetic takes."""
    return None if x is None else x.contiguous()


@functools.cache
def _processors(device: torch.device) -> int:
    # Without a device, Triton's interpreter runs programs one after another: few, but so that tests see several.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
