"""How often the suffix N-gram of a token was seen in training: hot, warm and cold tokens.

The suffix N-gram of position t is what a memory is asked with there, ids t-N+1 to t after token compression, padded
before the start of a document or window as the hash pads; it is all that an N-gram model would know of token t+1.
(Losses of hot and cold N-grams are told apart in arXiv:2601.16531 too.)
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engram.config import require
from eval.shared.held_out import HeldOut
from eval.shared.progress import shown
from eval.shared.subjects import Subject

Ints = NDArray[np.int64]
_USUAL_ORDER = 3  # of the paper's memories
_WINDOWS = 4096  # of the training split, at once


class Suffixes:
    """The distinct suffix N-grams of some text, numbered, with their number for any other text.

    Exact at any order: a suffix of n ids is the number of its last n - 1 and one id more.

    Args:
        ids: canonical ids `[windows, T]`, and `documents` theirs; N-grams don't cross a change of document.
        order: N, 1 or more.
        pad_id: stands for what is before a document or window.
    """

    def __init__(self, ids: Ints, documents: Ints, order: int, pad_id: int) -> None:
        self.order, self._pad_id = order, pad_id
        self._size = int(max(ids.max(initial=0), pad_id)) + 1
        self._known: list[Ints] = []
        numbers = np.zeros(ids.shape, np.int64)
        for shifted in self._shifted(ids, documents):
            keys, numbers = np.unique(numbers * self._size + shifted, return_inverse=True)
            numbers = numbers.reshape(ids.shape)
            self._known.append(keys)
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self._known[-1])

    def find(self, ids: Ints, documents: Ints) -> Ints:
        """The number of each suffix of another text `[windows, T]`; -1 for those that this text has not."""
        numbers = np.zeros(ids.shape, np.int64)
        there = ids < self._size
        for keys, shifted in zip(self._known, self._shifted(ids, documents), strict=True):
            wanted = numbers * self._size + shifted
            numbers = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            there &= (keys[numbers] == wanted) & (shifted < self._size)
            numbers[~there] = 0
        return np.where(there, numbers, -1)

    def _shifted(self, ids: Ints, documents: Ints) -> list[Ints]:
        """Ids as they were 0, 1, ... N-1 positions ago."""
        found = [ids]
        for n in range(1, self.order):
            earlier = np.full_like(ids, self._pad_id)
            same = documents[:, n:] == documents[:, :-n]
            earlier[:, n:] = np.where(same, ids[:, : ids.shape[1] - n], self._pad_id)
            found.append(earlier)
        return found


@dataclass(frozen=True)
class SuffixCounts:
    """Suffix N-grams of a held-out text.

    order: N. counts: how often that of each position was seen in training `[windows, T]`. numbers: which of the text's
    distinct N-grams it is, same shape.
    """

    order: int
    counts: Ints
    numbers: Ints

    def strata(self, hot_from: int) -> Ints:
        """Number of the stratum of each position: 0 never seen, 1 seen, 2 seen `hot_from` times or more."""
        return (self.counts > 0).astype(np.int64) + (self.counts >= hot_from)


def stratum_names(hot_from: int) -> list[str]:
    """The strata in words."""
    return ["cold: never seen", f"warm: seen 1 to {hot_from - 1} times", f"hot: {hot_from} times or more"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a question that tells strata apart."""
    parser.add_argument("--order", type=int, default=0, help="of the suffix N-grams (0: the memory's largest)")
    parser.add_argument("--hot-from", type=int, default=10, metavar="N", help="times seen that make an N-gram hot")


def count_suffixes(held_out: HeldOut, subject: Subject, order: int = 0) -> SuffixCounts:
    """Count the suffix N-grams of a text in what a checkpoint was trained on, window by window, epoch by epoch.

    For a checkpoint whose run is not known, in the training split of the text's data, each window once. `order` 0: the
    largest order of the checkpoint's memory, or of the memory that its config describes. Ids are compressed as that
    memory compresses them.
    """
    memory = subject.model.config.memory
    order = order or (memory.orders[-1] if memory is not None else _USUAL_ORDER)
    require(order >= 1, "order", order, "1 or more (0: the memory's largest)")
    data = held_out.data if subject.run is None else subject.run.data
    if subject.run is None:
        windows, times = np.arange(data.n_train_windows), np.ones(data.n_train_windows, np.int64)
    else:
        windows, times = subject.run.windows()
    lookup = None if memory is not None and not memory.compress else data.compressor().lookup.numpy()
    pad_id = data.pad_id if lookup is None else int(lookup[data.pad_id])
    text = held_out.whole()
    suffixes = Suffixes(_canonical(text["tokens"], lookup), text["document_ids"], order, pad_id)
    seen = np.zeros(len(suffixes), np.int64)
    for start in shown(range(0, len(windows), _WINDOWS), "N-grams of the training text"):
        part = data.train_windows(windows[start : start + _WINDOWS])
        found = suffixes.find(_canonical(part["tokens"].numpy(), lookup), part["document_ids"].numpy())
        weights = np.broadcast_to(times[start : start + _WINDOWS, None], found.shape)
        # Sums of float64 are exact up to 2**53.
        seen += np.bincount(found[found >= 0], weights[found >= 0], len(seen)).astype(np.int64)
    return SuffixCounts(order, seen[suffixes.numbers], suffixes.numbers)


def _canonical(ids: Ints, lookup: Ints | None) -> Ints:
    return ids if lookup is None else lookup[ids]
