"""The held-out text that a question is asked on: the windows of a validation split, in batches of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engram.config import ConfigError, require
from engram.training.data import Batch, TokenData
from eval.shared.progress import shown
from eval.shared.subjects import Subject

_TOKENS = 2**18  # read at once


class HeldOut:
    """The first windows of a validation split.

    Args:
        data: whose split.
        tokens: how many of its tokens; 0: those that training validated on, so that losses are those of the run.
        batch_size: windows at once; 0: about 8192 tokens.

    Raises:
        ConfigError: a number of tokens or windows that can't be.
    """

    def __init__(self, data: TokenData, tokens: int = 0, batch_size: int = 0) -> None:
        require(tokens >= 0, "tokens", tokens, "1 or more (0: those that training validated on)")
        require(batch_size >= 0, "batch-size", batch_size, "1 or more (0: about 8192 tokens)")
        self.data, self.seq_len = data, data.config.seq_len
        self.n_windows = min(data.n_held_out_windows, tokens // self.seq_len) if tokens else data.n_val_windows
        require(self.n_windows >= 1, "tokens", tokens, f"{self.seq_len} or more, a window")
        self.batch_size = batch_size or max(1, 8192 // self.seq_len)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains that `domains` of a batch counts."""
        return self.data.domains

    @cached_property
    def whole(self) -> dict[str, NDArray[Any]]:
        """All windows as one batch of arrays `[windows, T]`."""
        found: dict[str, NDArray[Any]] = {}
        for start in range(0, self.n_windows, size := max(1, _TOKENS // self.seq_len)):
            windows = np.arange(start, min(start + size, self.n_windows))
            for name, tensor in self.data.val_windows(windows).items():
                found.setdefault(name, np.empty((self.n_windows, self.seq_len), np.int64))[windows] = tensor.numpy()
        return found

    def batches(self, device: torch.device | str = "cpu", about: str = "") -> Iterator[Batch]:
        """The windows in order, as batches on a device. Shows its progress, about what is said, if anything is."""
        for start in shown(range(0, self.n_windows, self.batch_size), about):
            batch = self.data.val_windows(np.arange(start, min(start + self.batch_size, self.n_windows)))
            yield {name: tensor.to(device) for name, tensor in batch.items()}

    def of_each_token(
        self, subject: Subject, measure: Callable[[Batch], Tensor], about: str = ""
    ) -> Iterator[NDArray[np.float64]]:
        """What `measure` gives of each batch, `[B, T, ...]`, for all windows in order, on the host in float64: batch
        after batch, `[tokens, ...]`."""
        for batch in self.batches(subject.device, about):
            with torch.no_grad():
                found = measure(batch)
            yield found.flatten(0, 1).double().cpu().numpy()


def held_out_of(subjects: Sequence[Subject], data: TokenData | None, tokens: int, batch_size: int) -> HeldOut:
    """The held-out text for a number of checkpoints: `data`'s, or that of the first one's run.

    Raises `ConfigError` if there is none, and for a checkpoint whose tokenizer is not the text's.
    """
    if data is None:
        run = subjects[0].run
        if run is None:
            raise ConfigError(f"{str(subjects[0].path)!r} lies in no run's folder: name a text with --data")
        data = run.data
    for subject in subjects:
        if subject.tokenizer is not None and subject.tokenizer.to_str() != data.tokenizer.to_str():
            raise ConfigError(f"the tokenizer of {subject.name!r} is not that of the text")
    return HeldOut(data, tokens, batch_size)
