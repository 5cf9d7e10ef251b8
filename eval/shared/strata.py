"""How often the suffix N-gram of a token was seen in training: hot, warm and cold tokens.

The suffix N-gram of position t is what a memory is asked with there, ids t-N+1 to t after token compression, padded
before the start of a document or window as the hash pads; it is all that an N-gram model would know of token t+1.
(Losses of hot and cold N-grams are told apart in arXiv:2601.16531 too.)
"""

from __future__ import annotations

import argparse
import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.config import require
from engram.training.data import Batch
from eval.shared.held_out import HeldOut
from eval.shared.progress import shown
from eval.shared.subjects import Subject

Ints = NDArray[np.int64]
_USUAL_ORDER = 3  # of the paper's memories
_TOKENS = 2**20  # of the training split, at once


class Suffixes:
    """The distinct suffix N-grams of a text that may grow, numbered, with their number for any other text.

    Exact at any order: a suffix of n ids is the number of its last n - 1 and one id more.

    Args:
        order: N, 1 or more.
        pad_id: stands for what is before a document or window.
        n_ids: ids of the text lie below it, as `pad_id` does.
    """

    def __init__(self, order: int, pad_id: int, n_ids: int) -> None:
        self.order, self._pad_id, self._size = order, pad_id, n_ids
        none = np.zeros(0, np.int64)
        self._known = [(none, none)] * order  # ascending keys of the suffixes of 1, 2, ... ids, and their numbers

    def __len__(self) -> int:
        return len(self._known[-1][0])

    def add(self, ids: Ints, documents: Ints) -> Ints:
        """The number of each suffix of some more text `[windows, T]`; new ones get the next numbers.

        `ids` are canonical; N-grams don't cross a change in `documents`.
        """
        numbers = np.zeros(ids.shape, np.int64)
        for n, shifted in enumerate(self._shifted(ids, documents)):
            keys, known = self._known[n]
            every: Ints = numbers * self._size + shifted
            wanted, place = np.unique(every, return_inverse=True)
            new = ~np.isin(wanted, keys, assume_unique=True)
            at = np.searchsorted(keys, wanted)
            keys = np.insert(keys, at[new], wanted[new])
            known = np.insert(known, at[new], len(known) + np.arange(new.sum()))
            self._known[n] = keys, known
            numbers = known[np.searchsorted(keys, wanted)][place].reshape(ids.shape)
        return numbers

    def find(self, ids: Ints, documents: Ints) -> Ints:
        """The number of each suffix of another text `[windows, T]`; -1 for those that this text has not."""
        numbers = np.zeros(ids.shape, np.int64)
        there = (ids < self._size) & (len(self) > 0)
        if not there.any():
            return numbers - 1
        for (keys, known), shifted in zip(self._known, self._shifted(ids, documents), strict=True):
            wanted = numbers * self._size + shifted
            at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
            there &= (keys[at] == wanted) & (shifted < self._size)
            numbers = np.where(there, known[at], 0)
        return np.where(there, numbers, -1)

    def ids(self) -> Ints:
        """The ids of all N-grams by number, `[len, N]`, as in text: the last id last."""
        found = np.empty((len(self), self.order), np.int64)
        numbers = np.arange(len(self))
        for n in range(self.order - 1, -1, -1):
            keys, known = self._known[n]
            by_number = np.empty_like(keys)
            by_number[known] = keys
            numbers, found[:, self.order - 1 - n] = np.divmod(by_number[numbers], self._size)
        return found

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


def binned(counts: Ints) -> Ints:
    """The bin of each count: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, ..."""
    return np.frexp(counts)[1].astype(np.int64)


def bin_name(i: int) -> str:
    """The counts of a bin in words."""
    return str(i) if i < 2 else f"{2 ** (i - 1)} to {2**i - 1}"


def hot_from_of(options: argparse.Namespace) -> int:
    """The option of `add_options`. Raises `ConfigError` for one that leaves nothing warm."""
    require(options.hot_from >= 2, "hot-from", options.hot_from, "2 or more")
    return int(options.hot_from)


def stratum_names(hot_from: int) -> list[str]:
    """The strata in words."""
    return ["cold: never seen", f"warm: seen 1 to {hot_from - 1} times", f"hot: {hot_from} times or more"]


def explained(order: int, hot_from: int, first: dict[str, Any]) -> str:
    """What a page says of strata, as HTML; `first` is what is known of the checkpoint that they were counted for."""
    name = html.escape(first["name"])
    where = f"in the windows that {name} was trained on, each as often as it was"
    if first["tokens"] is None:
        where = f"in the training split of the text, once, since it is not known what {name} was trained on"
    return (
        f"<p>The suffix {order}-gram of a place in a text is its last {order} tokens, all that an N-gram memory is "
        f"asked with there. How often training met each is counted {where}: cold ones were never seen, hot ones "
        f"{hot_from} times or more, and warm ones between.</p>"
    )


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
    lookup = None if memory is not None and not memory.compress else data.compressor().lookup.numpy()
    pad_id = data.pad_id if lookup is None else int(lookup[data.pad_id])
    text = held_out.whole
    ids = _canonical(text["tokens"], lookup)
    suffixes = Suffixes(order, pad_id, int(max(ids.max(), pad_id)) + 1)
    numbers = suffixes.add(ids, text["document_ids"])
    seen = np.zeros(len(suffixes), np.int64)
    for part, times in trained_on(held_out, subject, "N-grams of the training text"):
        found = suffixes.find(_canonical(part["tokens"].numpy(), lookup), part["document_ids"].numpy())
        weights = np.broadcast_to(times[:, None], found.shape)
        # Sums of float64 are exact up to 2**53.
        seen += np.bincount(found[found >= 0], weights[found >= 0], len(seen)).astype(np.int64)
    return SuffixCounts(order, seen[numbers], numbers)


def trained_on(held_out: HeldOut, subject: Subject, about: str, batch_size: int = 0) -> Iterator[tuple[Batch, Ints]]:
    """Windows of the training split that a checkpoint was trained on, in batches, and how often each was.

    For a checkpoint whose run is not known, all windows of the training split of the text's data, once.
    """
    data = held_out.data if subject.run is None else subject.run.data
    if subject.run is None:
        windows, times = np.arange(data.n_train_windows), np.ones(data.n_train_windows, np.int64)
    else:
        windows, times = subject.run.windows()
    size = batch_size or max(1, _TOKENS // data.config.seq_len)
    for start in shown(range(0, len(windows), size), about):
        yield data.train_windows(windows[start : start + size]), times[start : start + size]


def _canonical(ids: Ints, lookup: Ints | None) -> Ints:
    return ids if lookup is None else lookup[ids]
