"""Which share of reads a cache of a given size would serve, for every size at once.

Fixed contents by counting; least-recently-used contents by the stack distances of Mattson et al. (1970): a read is
served just if fewer distinct things than the cache holds were read since the last read of the same.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def served_by_most_read(before: Ints, now: Ints, sizes: Ints) -> NDArray[np.float64]:
    """Share of reads `now` of each thing `[n]` that those most read `before` serve, for each number of them."""
    served = np.cumsum(now[np.argsort(-before, kind="stable")])
    return np.where(sizes > 0, served[sizes - 1], 0) / max(int(served[-1]), 1)


def served_by_least_recently_used(sequence: Ints, sizes: Ints) -> NDArray[np.float64]:
    """Share of reads in order `[n]` that an LRU cache, empty at first, serves, for each number of things it holds."""
    distances = np.sort(stack_distances(sequence))
    return np.searchsorted(distances, sizes) / max(len(sequence), 1)


def stack_distances(sequence: Ints) -> Ints:
    """How many distinct others were read between a read and the one of the same before; a large number if none was."""
    n = len(sequence)
    order = np.argsort(sequence, kind="stable")
    again = sequence[order[1:]] == sequence[order[:-1]]
    last = np.full(n, -1)
    last[order[1:][again]] = order[:-1][again]
    # Between them lie t - last - 1 reads; those whose own last read lies there too are of things counted already.
    return np.where(last < 0, np.iinfo(np.int64).max, np.arange(n) - last - 1 - _larger_before(last))


def _larger_before(values: Ints) -> Ints:
    """How many earlier values are larger than each, by a merge sort that counts."""
    n, found, order = len(values), np.zeros(len(values), np.int64), np.arange(len(values))
    lowest, span, width = values.min(initial=0), int(np.ptp(values)) + 1 if len(values) else 1, 1
    while width < n:
        # Both halves of a block are sorted already: the stable sort only merges them.
        order = order[np.argsort(order // (2 * width) * span + values[order] - lowest, kind="stable")]
        right = order // width % 2 == 1
        left_before = np.cumsum(~right) - order // (2 * width) * width
        found[order[right]] += width - left_before[right]
        width *= 2
    return found
