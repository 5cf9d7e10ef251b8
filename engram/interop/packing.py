"""Documents packed in one row, as transformers tells them: by positions that start again."""

from __future__ import annotations

from torch import Tensor


def documents_by_position(position_ids: Tensor, batch_size: int) -> Tensor:
    """Document ids `[B, T]` from positions `[B, T]` or `[1, T]`, which within a document go on by one.

    The last document is number 0, which tokens that follow belong to.
    """
    starts = position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1
    number = starts.cumsum(1).expand(batch_size, -1)
    return number[:, -1:] - number
