"""Groups of a text's tokens, and means over each of them with an interval over documents.

A group's mean is a ratio of two sums over documents. Its interval comes from drawing all documents of the text again,
those without a token of the group too, as the standard bootstrap of clusters does (Davison and Hinkley 1997, 3.8).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engram.sweep.fit import Interval
from eval.shared.bootstrap import ratios

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Kind(NamedTuple):
    """A way to tell tokens apart: its name, the names of its groups, and of each token its group's number."""

    name: str
    groups: list[str]
    of: Ints


def all_tokens(n: int) -> Kind:
    """One group of n tokens."""
    return Kind("all", ["all tokens"], np.zeros(n, np.int64))


class Groups:
    """The groups of some kinds that have any token, in their order.

    Sums need only what is in hand of the text: tokens come in parts, and by document and group a few numbers are kept.

    Args:
        documents: of each token `[tokens]`, in the order of the text.
        kinds: how tokens are told apart; each group has the tokens of all its windows.
    """

    def __init__(self, documents: Ints, kinds: Sequence[Kind]) -> None:
        numbers = documents.ravel() - documents.min()
        there = np.bincount(numbers) > 0
        self._document = (np.cumsum(there) - 1)[numbers].astype(np.int32)
        self._n_documents = int(there.sum())
        self.kinds, self.names = list[str](), list[str]()
        self._group = []
        for kind in kinds:
            known = np.bincount(kind.of.ravel(), minlength=len(kind.groups)) > 0
            self._group.append((len(self.names) + np.cumsum(known) - 1)[kind.of.ravel()].astype(np.int32))
            names = [name for name, has in zip(kind.groups, known, strict=True) if has]
            self.kinds += [kind.name] * len(names)
            self.names += names

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def tokens(self) -> Floats:
        """How many there are `[documents, groups]`."""
        return self.summed([np.ones(len(self._document))])

    def described(self) -> list[dict[str, Any]]:
        """What a page says of each."""
        tokens, documents = self.tokens.sum(0).astype(int).tolist(), (self.tokens > 0).sum(0).tolist()
        told = zip(self.kinds, self.names, tokens, documents, strict=True)
        return [dict(zip(("kind", "name", "tokens", "documents"), each, strict=True)) for each in told]

    def distinct(self, numbers: Ints) -> list[int]:
        """How many different ones of a number of each token, below 2**32, `[tokens]` are in each group."""
        found = np.zeros(len(self), np.int64)
        for group in self._group:
            both = np.sort(numbers.ravel() * len(self) + group)
            first = np.append(True, both[1:] != both[:-1])[: len(both)]
            found += np.bincount(both[first] % len(self), minlength=len(self))
        return found.tolist()

    def summed(self, parts: Iterable[NDArray[Any]]) -> Floats:
        """Sums `[documents, groups, ...]` of what is known of each token, given in parts `[some tokens, ...]`."""
        start, sums, shape = 0, np.zeros(0), tuple[int, ...]()
        for part in parts:
            values, shape = part.reshape(len(part), -1), part.shape[1:]
            S = values.shape[1]
            sums = sums if len(sums) else np.zeros(self._n_documents * len(self) * S)
            some = slice(start, start + len(part))
            for group in self._group:
                cells = self._document[some] * np.int64(len(self)) + group[some]
                # Token after token, so that parts of any size give the same.
                np.add.at(sums, (cells[:, None] * S + np.arange(S)).ravel(), values.ravel())
            start += len(part)
        return sums.reshape(self._n_documents, len(self), *shape)

    def means(self, sums: Floats, over: Floats | None = None) -> list[list[Interval]]:
        """Of sums `[documents, groups, S]` over tokens the means, S for each group; `over`: what to divide by in the
        place of numbers of tokens, `[documents, groups]`."""
        over = np.broadcast_to((self.tokens if over is None else over)[:, :, None], sums.shape)
        found = ratios(sums.reshape(len(sums), -1), over.reshape(len(sums), -1))
        return [found[i : i + sums.shape[2]] for i in range(0, len(found), sums.shape[2])]

    def mean(self, sums: Floats, over: Floats | None = None) -> list[Interval]:
        """The same of sums `[documents, groups]`, one for each group."""
        return [one for (one,) in self.means(sums[:, :, None], over)]
