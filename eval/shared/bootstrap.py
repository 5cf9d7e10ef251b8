"""Intervals over documents: tokens of one document are alike, so documents are what is drawn again (Efron 1979)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engram.sweep.fit import CONFIDENCE, Interval

Floats = NDArray[np.float64]
DRAWS = 2000
_SEED = 0
_CHUNK = 2**22  # counts at once


def sums_by_document(documents: NDArray[np.int64], values: Floats) -> Floats:
    """Sums `[documents, ...]` of values `[n, ...]` whose documents are `[n]`; documents in ascending order."""
    numbers, place = np.unique(documents, return_inverse=True)
    sums = np.zeros((len(numbers), *values.shape[1:]))
    np.add.at(sums, place, values)
    return sums


def ratios(numerators: Floats, denominators: Floats, draws: int = DRAWS) -> list[Interval]:
    """sum of numerators / sum of denominators over documents, `[documents, S]` each, for every statistic S, with the
    percentile interval of the bootstrap. All statistics see the same draws. One that fewer than two documents tell of
    has no interval."""
    values = _divided(numerators.sum(0), denominators.sum(0))
    known = (denominators != 0).sum(0) >= 2
    drawn = np.concatenate([_divided(c @ numerators, c @ denominators) for c in _counts(len(numerators), draws)])
    tail = (1 - CONFIDENCE) / 2
    intervals = []
    for value, column, several in zip(values, drawn.T, known, strict=True):
        # A draw without any of its documents says nothing of it.
        low, high = np.nanquantile(column, [tail, 1 - tail]) if several else (np.nan, np.nan)
        intervals.append(Interval(float(value), float(low), float(high)))
    return intervals


def _divided(a: Floats, b: Floats) -> Floats:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b != 0)


def _counts(n: int, draws: int) -> Iterator[Floats]:
    """How often each of n documents is drawn, `[some draws, n]`."""
    random = np.random.default_rng(_SEED)
    size = max(1, _CHUNK // n)
    for start in range(0, draws, size):
        yield random.multinomial(n, np.full(n, 1 / n), min(size, draws - start)).astype(np.float64)
