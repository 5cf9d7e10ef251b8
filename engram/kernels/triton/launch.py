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


class Walk(NamedTuple):
    """Programs of 16 warps, one for each processor, that walk over segments of tokens in steps of a few.

    Gates are computed on blocks of step x branches (their number padded to a power of two) x gate_width channels,
    results on step x width. Steps are as long as lets h and v of a step of all programs lie in the L2 cache together.
    """

    step: int
    segment: int
    programs: int
    branches: int
    gate_width: int
    width: int

    @classmethod
    def of(cls, N: int, M: int, D: int, element_size: int, device: torch.device) -> Walk:
        processors, cache = machine(device)
        segment, branches, fits = ceil_div(N, processors), triton.next_power_of_2(M), 8
        while fits > 1 and fits * (M + 1) * D * element_size * processors > cache:
            fits //= 2
        step = min(fits, triton.next_power_of_2(segment))
        segment = ceil_div(segment, step) * step
        # For the 4 numbers of each thread; gates have 8, as what they are sums of would else be asked for too late.
        gate_width, width = max(WIDTH, 16 * WIDTH // (step * branches)), 16 * WIDTH // step
        return cls(step, segment, ceil_div(N, segment), branches, min(gate_width, _padded(D)), min(width, _padded(D)))


class Row(NamedTuple):
    """Programs that each take all channels of a token, in `parts` blocks, and one token of a run after another."""

    width: int
    parts: int
    warps: int
    run: int
    programs: int

    @classmethod
    def of(cls, N: int, D: int, device: torch.device) -> Row:
        warps = 8 if D <= 3072 else 16  # 2 programs to a processor while their registers allow it
        width = min(warps * WIDTH, _padded(D))
        run = ceil_div(N, machine(device).processors * 16 // warps)
        return cls(width, ceil_div(D, width), warps, run, ceil_div(N, run))


class Rows(NamedTuple):
    """Blocks of whole rows, narrow ones several to a block, one of which a program holds in registers."""

    rows: int
    width: int
    warps: int
    blocks: int

    @classmethod
    def of(cls, R: int, D: int, each: int, warps: int) -> Rows:
        """For `each` numbers a thread; there are more than `warps` warps only where a row needs them."""
        width = _padded(D)
        warps = min(max(width // (32 * each), warps), 32)
        rows = max(warps * 32 * each // width, 1)
        return cls(rows, width, warps, ceil_div(R, rows))

    @property
    def registers(self) -> int:
        """Of a thread, when 16 warps run on a processor, or 32 of one program."""
        return 128 if self.warps <= 16 else 64

    def resident(self, device: torch.device) -> int:
        """Programs that run at once with so many, if there are blocks for them."""
        return min(self.blocks, machine(device).processors * max(16 // self.warps, 1))


class Strip(NamedTuple):
    """Programs of one warp, each for a block of channels and every `dilation`-th token of a run.

    As many as a device holds when each of their threads takes all of 255 registers. Of what they keep there, `held`
    numbers for each channel, three times over, are most: beyond 16 of them blocks are narrower.
    """

    width: int
    blocks: int
    run: int
    runs: int

    @classmethod
    def of(cls, N: int, D: int, held: int, dilation: int, device: torch.device) -> Strip:
        width = min(WIDTH if held <= 16 else WIDTH // 2 if held <= 32 else WIDTH // 4, _padded(D))
        blocks = ceil_div(D, width)
        runs = max(8 * machine(device).processors // (blocks * dilation), 1)
        run = ceil_div(ceil_div(N, runs), dilation) * dilation
        return cls(width, blocks, run, ceil_div(N, run))


def _padded(D: int) -> int:
    return max(triton.next_power_of_2(D), 16)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def dense(x: Tensor | None) -> Tensor | None:
    """`x` in contiguous memory, which is what the kernels' pointer arithmetic takes."""
    return None if x is None else x.contiguous()


def at_most(registers: int) -> dict[str, int]:
    """The option that limits the registers of a thread, which NVIDIA's devices alone have."""
    return {"maxnreg": registers} if torch.version.hip is None else {}


class Machine(NamedTuple):
    """Processors of a device, and bytes of its L2 cache."""

    processors: int
    cache: int


@functools.cache
def machine(device: torch.device) -> Machine:
    """What launches are cut to."""
    if device.type != "cuda":  # the interpreter's, which runs programs one after another
        return Machine(1, 50 * 2**20)
    found = torch.cuda.get_device_properties(device)
    return Machine(found.multi_processor_count, found.L2_cache_size)
