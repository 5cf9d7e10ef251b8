"""The distinct suffix N-grams of a text: numbered, found again in another text, or counted, always exactly.

An N-gram is a key of 63 bits. Keys are sorted and looked up in order, some at a time, since to look each up where it
stands in a text would wait for memory every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_BITS = 63  # of a key
_NUMBER_BITS = 40  # of N-grams that are part of a longer one
_PENDING = 2**22


class Suffixes:
    """The distinct suffix N-grams of a text that may grow, numbered, with their number for any other text.

    Exact at any order: a key is all ids of a suffix if they fit, or else the number of its last ids and the ids before
    them.

    Args:
        order: N, 1 or more.
        pad_id: stands for what is before a document or window.
        n_ids: ids of the text lie below it, as `pad_id` does.
    """

    def __init__(self, order: int, pad_id: int, n_ids: int) -> None:
        self.order, self._pad_id, self._size = order, pad_id, n_ids
        bits = math.log2(max(n_ids, 2))
        more = order if order * bits < _BITS else max(1, int((_BITS - _NUMBER_BITS) / bits))
        self._last = Suffixes(order - more, pad_id, n_ids) if more < order else None
        self._places = range(order - more, order)  # ids that a key holds, by how many positions ago they stood
        self._keys, self._numbers = np.zeros(0, np.int64), np.zeros(0, np.int64)  # by ascending key

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, ids: Ints, documents: Ints) -> Ints:
        """The number of each suffix of some more text `[windows, T]`; new ones get the next numbers.

        `ids` are canonical; N-grams don't cross a change in `documents`.
        """
        wanted, place = np.unique(self.keys(ids, documents), return_inverse=True)
        at, known = located(self._keys, wanted)
        self._numbers = np.insert(self._numbers, at[~known], len(self) + np.arange((~known).sum()))
        self._keys = np.insert(self._keys, at[~known], wanted[~known])
        return self._numbers[np.searchsorted(self._keys, wanted)][place].reshape(ids.shape)

    def find(self, ids: Ints, documents: Ints) -> Ints:
        """The number of each suffix of another text `[windows, T]`; -1 for those that this text has not."""
        wanted, place = np.unique(self._keys_there(ids, documents), return_inverse=True)
        at, known = located(self._keys, wanted)
        found = np.full(len(wanted), -1)
        found[known] = self._numbers[at[known]]
        return found[place].reshape(ids.shape)

    def times(self, ids: Ints, documents: Ints, times: Ints) -> tuple[Ints, Ints]:
        """Numbers of this text's suffixes that another text `[windows, T]` has, and how often each is there if each of
        its windows is read so many times, `[windows]`."""
        wanted, n = counted(self._keys_there(ids, documents), times)
        at, known = located(self._keys, wanted)
        return self._numbers[at[known]], n[known]

    def ids(self) -> Ints:
        """The ids of all N-grams by number, `[len, N]`, as in text: the last id last."""
        keys = np.empty_like(self._keys)
        keys[self._numbers] = self._keys
        return self.ids_of(keys)

    def keys(self, ids: Ints, documents: Ints) -> Ints:
        """The key of each suffix of this text `[windows, T]`: different ones have different keys."""
        keys = self._last.add(ids, documents) if self._last is not None else np.zeros_like(ids)
        for n in self._places:
            keys = keys * self._size + self._earlier(ids, documents, n)
        return keys

    def ids_of(self, keys: Ints) -> Ints:
        """The ids of the N-grams of some keys `[n]`, `[n, N]`."""
        found = np.empty((len(keys), self.order), np.int64)
        for n in reversed(self._places):
            keys, found[:, self.order - 1 - n] = np.divmod(keys, self._size)
        if self._last is not None:
            found[:, self.order - self._last.order :] = self._last.ids()[keys]
        return found

    def _keys_there(self, ids: Ints, documents: Ints) -> Ints:
        """The key of each suffix of another text; -1 for those that can't be of this one."""
        keys = self._last.find(ids, documents) if self._last is not None else np.zeros_like(ids)
        there = keys >= 0
        for n in self._places:
            earlier = self._earlier(ids, documents, n)
            there &= earlier < self._size
            keys = keys * self._size + earlier
        return np.where(there, keys, -1)

    def _earlier(self, ids: Ints, documents: Ints, n: int) -> Ints:
        """Ids as they were n positions ago."""
        if n == 0:
            return ids
        earlier = np.full_like(ids, self._pad_id)
        same = documents[:, n:] == documents[:, :-n]
        earlier[:, n:] = np.where(same, ids[:, : ids.shape[1] - n], self._pad_id)
        return earlier


class Counts:
    """How often each of some keys was met, where there may be very many: ascending arrays, and new ones beside them
    that are merged when they have become as many as a quarter."""

    def __init__(self) -> None:
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._new: list[tuple[Ints, Ints]] = []
        self._pending = 0

    def add(self, keys: Ints, times: Ints) -> None:
        """Count keys `[windows, T]`, those of each window so many times, `[windows]`."""
        self._new.append(counted(keys, times))
        self._pending += len(self._new[-1][0])
        if self._pending > max(_PENDING, len(self._keys) // 4):
            self._merge()

    def all(self) -> tuple[Ints, Ints]:
        """Ascending keys and their counts."""
        self._merge()
        return self._keys, self._counts

    def _merge(self) -> None:
        if not self._new:
            return
        keys, counts = _joined(self._new)
        self._new, self._pending = [], 0
        at, known = located(self._keys, keys)
        self._counts[at[known]] += counts[known]
        self._keys = np.insert(self._keys, at[~known], keys[~known])
        self._counts = np.insert(self._counts, at[~known], counts[~known])


def counted(keys: Ints, times: Ints) -> tuple[Ints, Ints]:
    """The distinct keys of `[windows, T]`, ascending, and how often each is there if a window is read so many times,
    `[windows]`; without those below 0."""
    parts = [_distinct(keys[times == n].ravel(), n) for n in np.unique(times)]
    return parts[0] if len(parts) == 1 else _joined(parts)


def located(keys: Ints, wanted: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Where wanted keys are or would be among ascending ones, and which are there."""
    at = np.searchsorted(keys, wanted)
    known = np.zeros(len(wanted), bool)
    inside = at < len(keys)
    known[inside] = keys[at[inside]] == wanted[inside]
    return at, known


def _joined(parts: Sequence[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Ascending keys of all parts, and the sums of their counts."""
    keys, counts = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.diff(keys, prepend=-2))
    return keys[first], np.add.reduceat(counts, first) if len(first) else counts


def _distinct(keys: Ints, times: int) -> tuple[Ints, Ints]:
    ascending = np.sort(keys)
    ascending = ascending[np.searchsorted(ascending, 0) :]
    first = np.flatnonzero(np.diff(ascending, prepend=-1))
    return ascending[first], np.diff(np.append(first, len(ascending))) * times
