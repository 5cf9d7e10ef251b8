"""Reads by rank, and the exponent of the power law that they follow over a range (Zipf 1949)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_POINTS = 60
_FIRST, _LEAST = 10, 10  # the fit leaves out the first ranks, and counts so small that ties make steps of them


@dataclass(frozen=True)
class Zipf:
    """ranks, reads: some points of the curve, evenly spaced by logarithm. exponent: s of reads ~ rank^-s by least
    squares of logarithms over points with ranks `first` to `last`; none if that is less than a factor of 2."""

    ranks: NDArray[np.int64]
    reads: NDArray[np.int64]
    exponent: float | None
    first: int
    last: int


def zipf(counts: NDArray[np.int64]) -> Zipf:
    """Of how often each thing was read, in any order; those that never were are left out."""
    descending = np.sort(counts[counts > 0])[::-1]
    ranks = _spaced(1, len(descending)) if len(descending) else np.zeros(0, np.int64)
    last = int((descending >= _LEAST).sum())
    exponent = None
    if last >= 2 * _FIRST:
        fitted = _spaced(_FIRST, last)
        exponent = -float(np.polyfit(np.log(fitted), np.log(descending[fitted - 1]), 1)[0])
    return Zipf(ranks, descending[ranks - 1], exponent, _FIRST, last)


def _spaced(first: int, last: int) -> NDArray[np.int64]:
    return np.unique(np.geomspace(first, last, _POINTS).round().astype(np.int64))
