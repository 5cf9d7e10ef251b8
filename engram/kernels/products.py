"""Products of float32 matrices on the CPU whose factors are rounded to bfloat16 and whose sums are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch

_lock = Lock()
_inside = 0  # how many threads are within products in bfloat16
_before = "none"  # the setting that the first of them found


@contextmanager
def products_in(bfloat16: bool) -> Iterator[None]:
    """Let oneDNN take products of float32 matrices in bfloat16, summed in float32, and set it back afterwards.

    The setting is the whole process's (`torch.backends.mkldnn.matmul`), so this stands inside operators only. Of
    threads that are here together the last one to leave sets it back.
    """
    global _inside, _before
    if not bfloat16:
        yield
        return
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _lock:
        if not _inside:
            _before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                matmul.fp32_precision = _before
