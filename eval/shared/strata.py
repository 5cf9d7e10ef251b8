"""How often the suffix N-gram of a token was seen in training: hot, warm and cold tokens.

The suffix N-gram of position t is what a memory is asked with there, ids t-N+1 to t after token compression, padded
before the start of a document or window as the hash pads; it is all that an N-gram model would know of token t+1.
(Losses of hot and cold N-grams are told apart in arXiv:2601.16531 too.)
"""

from __future__ import annotations

import argparse
import dataclasses
import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.config import require
from engram.training.data import Batch
from eval.shared.groups import Kind
from eval.shared.held_out import HeldOut
from eval.shared.ngrams import Suffixes
from eval.shared.progress import shown
from eval.shared.subjects import Subject

Ints = NDArray[np.int64]
_USUAL_ORDER = 3  # of the paper's memories
_TOKENS = 2**20  # of the training split, at once


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

    def by_stratum(self, hot_from: int) -> Kind:
        """Tokens told apart by stratum."""
        return Kind("stratum", stratum_names(hot_from), self.strata(hot_from))

    def by_count(self) -> Kind:
        """Tokens told apart by times seen."""
        bins = binned(self.counts)
        return Kind("count", [bin_name(i) for i in range(int(bins.max()) + 1)], bins)


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


def explained(order: int, hot_from: int, first: dict[str, Any], train_tokens: int) -> str:
    """What a page says of strata, as HTML; `first` is what is known of the checkpoint that they were counted for."""
    name = html.escape(first["name"])
    where = f"in the windows that {name} was trained on, each as often as it was"
    if first["tokens"] is None:
        where = f"in the training split of the text, once, since it is not known what {name} was trained on"
    if train_tokens:
        where += f" (the first {train_tokens:,} tokens of it)"
    return (
        f"<p>The suffix {order}-gram of a place in a text is its last {order} tokens, all that an N-gram memory is "
        f"asked with there. How often training met each is counted {where}: cold ones were never seen, hot ones "
        f"{hot_from} times or more, and warm ones between.</p>"
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a question that tells strata apart."""
    parser.add_argument("--order", type=int, default=0, help="of the suffix N-grams (0: the memory's largest)")
    parser.add_argument("--hot-from", type=int, default=10, metavar="N", help="times seen that make an N-gram hot")
    add_train_tokens(parser)


def add_train_tokens(parser: argparse.ArgumentParser) -> None:
    """The option of a question that reads again what a checkpoint was trained on."""
    parser.add_argument(
        "--train-tokens", type=int, default=0, metavar="N", help="of training to read again, the first N (0: all)"
    )


def count_suffixes(held_out: HeldOut, subject: Subject, order: int = 0, train_tokens: int = 0) -> SuffixCounts:
    """Count the suffix N-grams of a text in what a checkpoint was trained on, window by window, epoch by epoch.

    For a checkpoint whose run is not known, in the training split of the text's data, each window once. `order` 0: the
    largest order of the checkpoint's memory, or of the memory that its config describes. Ids are compressed as that
    memory compresses them. `train_tokens`: as in `trained_on`.
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
    for part, times in trained_on(held_out, subject, "N-grams of the training text", train_tokens):
        found, n = suffixes.times(_canonical(part["tokens"].numpy(), lookup), part["document_ids"].numpy(), times)
        seen[found] += n
    return SuffixCounts(order, seen[numbers], numbers)


def trained_on(
    held_out: HeldOut, subject: Subject, about: str, tokens: int = 0, batch_size: int = 0
) -> Iterator[tuple[Batch, Ints]]:
    """Windows of the training split that a checkpoint was trained on, in batches, and how often each was; `tokens`: in
    the first so many tokens of its training (0: in all of it).

    For a checkpoint whose run is not known, all windows of the training split of the text's data, once, or the first.
    """
    data = held_out.data if subject.run is None else subject.run.data
    require(tokens >= 0, "train-tokens", tokens, "1 or more (0: all)")
    most = -(-tokens // data.config.seq_len)
    if subject.run is None:
        windows = np.arange(min(data.n_train_windows, most or data.n_train_windows))
        times = np.ones(len(windows), np.int64)
    else:
        run = subject.run
        windows, times = dataclasses.replace(run, samples=min(run.samples, most or run.samples)).windows()
    size = batch_size or max(1, _TOKENS // data.config.seq_len)
    for start in shown(range(0, len(windows), size), about):
        yield data.train_windows(windows[start : start + size]), times[start : start + size]


def _canonical(ids: Ints, lookup: Ints | None) -> Ints:
    return ids if lookup is None else lookup[ids]
