"""What the pictures of several questions share: values with their intervals, and the axis of times seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.pages import GREY

Told = dict[str, float | None]  # an interval as JSON has it


def bounds(intervals: Sequence[Told]) -> NDArray[np.float64]:
    """Value, low and high end of each interval, `[n, 3]`; not a number what is unknown."""
    return np.array([[np.nan if end is None else end for end in each.values()] for each in intervals])


def plot_intervals(ax: Any, intervals: Sequence[Told], **style: Any) -> None:
    """Values in a row, with their intervals as bars."""
    value, low, high = bounds(intervals).T
    errors = np.stack([value - low, high - value])
    ax.errorbar(np.arange(len(value)), value, errors, **{"fmt": "o-", "ms": 4, "capsize": 2, **style})


def name_counts(ax: Any, groups: Sequence[dict[str, Any]], order: int) -> None:
    """Name the groups by count along an axis."""
    names = [group["name"] for group in groups if group["kind"] == "count"]
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    ax.set_xlabel(f"times the suffix {order}-gram was seen in training")
    ax.grid(alpha=0.25)


def draw_shares(ax: Any, groups: Sequence[dict[str, Any]]) -> None:
    """Bars behind the groups by count: the share of all tokens, the first group, that each of them has."""
    tokens = [group["tokens"] for group in groups if group["kind"] == "count"]
    shares = ax.twinx()
    shares.bar(range(len(tokens)), [n / groups[0]["tokens"] for n in tokens], color=GREY, alpha=0.15)
    shares.set_ylabel("share of tokens (bars)")
