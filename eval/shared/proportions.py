"""Shares of trials that went well, with Wilson's intervals, which hold where all or none did."""

from __future__ import annotations

import math

_Z = 1.959963984540054  # of a normal distribution, 95 % within


def proportion(right: int, n: int, trials: float | None = None) -> dict[str, float | None]:
    """The share of `right` ones of `n`, with its 95 % interval, as `eval.shared.page.interval` takes it.

    trials: how many of the `n` were independent of each other; all if None. Nothing is known of none.
    """
    if n == 0:
        return {"value": None, "low": None, "high": None, "right": 0, "n": 0}
    p, m = right / n, trials or n
    middle, reach = p + _Z**2 / (2 * m), _Z * math.sqrt(p * (1 - p) / m + _Z**2 / (4 * m**2))
    low, high = ((middle + side * reach) / (1 + _Z**2 / m) for side in (-1, 1))
    return {"value": p, "low": max(low, 0.0), "high": min(high, 1.0), "right": right, "n": n}
