"""Rows of tables that don't lie where they are used: gathered from a mapped file, or picked from a cache or the host.

A row of a mapped file that is not in memory stops whoever reads it for a trip to the disk, one after the other; told
of the rows beforehand, the system fetches them side by side. Source: madvise(2), MADV_WILLNEED.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engram.kernels.library import define
from engram.kernels.rows import gather_rows_reference

_gather_mapped = define(
    "gather_mapped(Tensor mapped, Tensor rows) -> Tensor",
    gather_rows_reference,
    lambda mapped, rows: mapped.new_empty(len(rows), mapped.shape[1]),
)


def gather_mapped(mapped: Tensor, rows: Tensor) -> Tensor:
    """Rows `[n]` (int64, best ascending) of a table `[R, S]` in a mapped file, `[n, S]`, by the calling thread alone.

    Raises IndexError beyond the table.
    """
    return _gather_mapped(mapped, rows)


def pick_rows_reference(cache: Tensor, slots: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """`pick_rows` in plain torch."""
    picked = cache.new_empty(*slots.shape, cache.shape[1])
    cached = slots >= 0
    picked[cached] = gather_rows_reference(cache, slots[cached])
    picked[~cached] = gather_rows_reference(table, rows[~cached])
    return picked


_pick_rows = define(
    "pick_rows(Tensor cache, Tensor slots, Tensor table, Tensor rows) -> Tensor",
    pick_rows_reference,
    lambda cache, slots, table, rows: cache.new_empty(*slots.shape, cache.shape[1]),
)


def pick_rows(cache: Tensor, slots: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Records `[..., S]` (uint8): `cache[slots]` where slots `[...]` are 0 or more, else `table[rows]`.

    With a CUDA device's kernel (`picks_from_host`) the table may lie in pinned memory of the host, while all else lies
    on the device.
    """
    return _pick_rows(cache, slots, table, rows)


def picks_from_host() -> bool:
    """Whether this process has a kernel by which a CUDA device reads the host's memory."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("engram::pick_rows", "CUDA")
