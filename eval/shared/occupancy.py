"""What hashing at random would do: balls thrown into bins, and how many share theirs (exact moments, no approximation).

A ball is alone with probability q = (1 - 1/p)^(D-1) for D balls and p bins, and two given balls both are with
(1 - 1/p) (1 - 2/p)^(D-2); mean and variance of any weighted share of balls that are not alone follow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Shared:
    """A share of balls that are not alone in their bin: as it is, as it would be at random, and its deviation then."""

    value: float
    expected: float
    sd: float


def shared(bins: NDArray[np.int64], weights: NDArray[np.int64], n_bins: int) -> Shared:
    """Of balls in `bins` `[D]`, each counted by its weight `[D]`; not numbers if there are no balls."""
    D, total = len(bins), weights.sum(dtype=np.float64)
    if not D:
        return Shared(np.nan, np.nan, np.nan)
    crowded = np.bincount(bins, minlength=n_bins)[bins] > 1
    squares = float((weights / total) @ (weights / total))
    expected, variance = _moments(D, n_bins, squares)
    return Shared(float(weights[crowded].sum() / total), expected, variance**0.5)


def _moments(D: int, p: int, squares: float) -> tuple[float, float]:
    """Mean and variance of the weighted share, where `squares` is the sum of squared weights that add up to 1."""
    if D == 1:
        return 0.0, 0.0
    if p == 1:
        return 1.0, 0.0
    q = np.exp((D - 1) * np.log1p(-1 / p))
    with np.errstate(divide="ignore"):  # of two bins at most two balls are alone
        more = (D - 2) * np.log1p(-1 / (p - 1) ** 2) if D > 2 else 0.0
    covariance = q * q * np.expm1(more - np.log1p(-1 / p))
    return float(1 - q), float(max(squares * (q - q * q) + (1 - squares) * covariance, 0.0))


def occupied(D: int, n_bins: int) -> float:
    """Bins that D balls are expected to hit."""
    return float(-n_bins * np.expm1(D * np.log1p(-1 / n_bins))) if n_bins > 1 else float(min(D, 1))
