"""Block sizes and grids that the Triton kernels share.

Each thread holds 4 numbers of a block, as many as one 16-byte load gives of float32: so blocks of bfloat16 and of
float32 are laid out alike, and nothing is moved between threads where they meet.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

WARP = 32  # threads
WARPS = 32 if torch.version.hip is None else 16  # of a program at most: 1024 threads, of which HIP puts 64 in a warp
WIDTH = 4 * WARP  # channels


class Gates(NamedTuple):
    """Programs with a warp for each branch, their number padded to a power of two, for one token at a time.

    A thread holds 16 bytes of each block, of the widest type there is, and asks for `ahead` blocks at once.
    """

    branches: int
    width: int
    ahead: int
    warps: int

    @classmethod
    def of(cls, M: int, D: int, inputs: list[Tensor]) -> Gates:
        branches = triton.next_power_of_2(M)
        width = min(WARP * 16 // max(x.element_size() for x in inputs), _padded(D))
        blocks = ceil_div(D, width)
        ahead = min(range(1, 6), key=lambda n: (ceil_div(blocks, n) * n, -n))
        return cls(branches, width, ahead, min(branches, 16))


TURN_STEPS, TURN_TOKENS = 16, 192


class Turns(NamedTuple):
    """Programs that draw tickets: in each turn for the gates of a chunk's tokens, then for the results of the chunk
    `lag` before it, by phases of the dilation and blocks of channels.

    A chunk has TURN_STEPS steps of the dilation, over which results use the weights that they hold, if those are no
    more than TURN_TOKENS tokens: at least so many lie in the L2 cache between their gates and their results. There are
    as many programs as a device runs at once.
    """

    chunk: int
    lag: int
    block: int
    tickets: int
    programs: int
    registers: int

    @classmethod
    def of(cls, N: int, M: int, D: int, taps: int, dilation: int, warps: int, device: torch.device) -> Turns:
        width = WIDTH if M * taps <= 16 else WIDTH // 2 if M * taps <= 32 else WIDTH // 4  # for weights in registers
        block = min(warps * width, _padded(D))
        chunk = max(min(TURN_STEPS, TURN_TOKENS // dilation), 1) * dilation
        chunks = ceil_div(N, chunk)
        lag = min(ceil_div(TURN_TOKENS, chunk), chunks - 1)
        tickets = (chunks + lag) * (chunk + dilation * ceil_div(D, block))
        resident, registers = (12, 168) if warps <= 4 else (16, 128)
        programs = min(machine(device).processors * resident // warps, tickets)
        return cls(chunk, lag, block, tickets, programs, registers)


class Row(NamedTuple):
    """Programs of 8 warps, one for each processor, that each take all channels of a token, in `parts` blocks, and one
    token of a run after another."""

    width: int
    parts: int
    run: int
    programs: int

    @classmethod
    def of(cls, N: int, D: int, device: torch.device) -> Row:
        width = min(8 * WIDTH, _padded(D))
        run = ceil_div(N, machine(device).processors)
        return cls(width, ceil_div(D, width), run, ceil_div(N, run))


class Step(NamedTuple):
    """Programs of up to 8 warps that each take all channels of a branch of a token, in `parts` blocks, and ask for
    `ahead` of them at once."""

    width: int
    parts: int
    ahead: int
    warps: int

    @classmethod
    def of(cls, D: int, asked: list[Tensor]) -> Step:
        """For a row of each tensor: a thread asks for as many blocks as 160 registers would hold of it, or one."""
        width = min(8 * WIDTH, _padded(D))
        parts, each = ceil_div(D, width), 4 * sum(x.element_size() for x in asked)
        return cls(width, parts, min(max(640 // each, 1), parts), max(width // WIDTH, 1))


class Rows(NamedTuple):
    """Blocks of whole rows, narrow ones several to a block, one of which a program holds in registers: of `width`
    channels, and a second of `rest`, if that is not 0."""

    rows: int
    width: int
    warps: int
    blocks: int
    rest: int = 0

    @classmethod
    def of(cls, R: int, D: int, each: int, warps: int) -> Rows:
        """For `each` numbers a thread; there are more than `warps` warps only where a row needs them."""
        width = _padded(D)
        warps = min(max(width // (WARP * each), warps), WARPS)
        rows = max(warps * WARP * each // width, 1)
        return cls(rows, width, warps, ceil_div(R, rows))

    @classmethod
    def in_two(cls, R: int, D: int, each: int) -> Rows | None:
        """For `each` numbers a thread in the first block, if the second is at most a quarter of it: else None."""
        width = _padded(D + 1) // 2  # the largest power of two up to D
        rest = _padded(D - width)
        if D < 64 or width == D or rest > width // 4:
            return None
        warps = min(max(width // (WARP * each), 4), WARPS)
        rows = max(warps * WARP * each // width, 1)
        return cls(rows, width, warps, ceil_div(R, rows), rest)

    @property
    def registers(self) -> int:
        """Of a thread, when 16 warps run on a processor, or 32 of one program."""
        return 128 if self.warps <= 16 else 64

    def resident(self, device: torch.device) -> int:
        """Programs that run at once with so many, if there are blocks for them."""
        return min(self.blocks, machine(device).processors * max(16 // self.warps, 1))


class Strip(NamedTuple):
    """Programs of one warp, each for a block of channels and every `apart`-th token of a run."""

    width: int
    blocks: int
    run: int
    runs: int

    @classmethod
    def of(cls, N: int, D: int, width: int, resident: int, apart: int, device: torch.device) -> Strip:
        """As many programs as a device holds of which `resident` run on a processor."""
        width = min(width, _padded(D))
        blocks = ceil_div(D, width)
        runs = max(resident * machine(device).processors // (blocks * apart), 1)
        run = ceil_div(ceil_div(N, runs), apart) * apart
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


def in_bulk(*rows: Tensor) -> bool:
    """Whether `prefetch_bulk` takes rows of these tensors `[..., D]`: 16 bytes are its grain."""
    fits = all(x.data_ptr() % 16 == 0 and x.shape[-1] * x.itemsize % 16 == 0 for x in rows)
    return fits and machine(rows[0].device).bulk


class Machine(NamedTuple):
    """Processors of a device, bytes of its L2 cache, and whether one instruction asks for any piece of memory."""

    processors: int
    cache: int
    bulk: bool = False


@functools.cache
def machine(device: torch.device) -> Machine:
    """What launches are cut to."""
    if device.type != "cuda":  # the interpreter's, which runs programs one after another
        return Machine(1, 50 * 2**20)
    found = torch.cuda.get_device_properties(device)
    return Machine(found.multi_processor_count, found.L2_cache_size, torch.version.hip is None and found.major >= 9)
