"""Products of float32 matrices on the CPU whose factors are rounded to bfloat16 and whose sums are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def products_in(bfloat16: bool) -> Iterator[None]:
    """Let oneDNN take products of float32 matrices in bfloat16, summed in float32, and set it back afterwards.

    The setting is the whole process's (`torch.backends.mkldnn.matmul`), so this stands inside operators only.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    if bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
