from collections import Counter, OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.shared.caching import served_by_least_recently_used, served_by_most_read


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=70))
def test_an_lru_cache_of_any_size_serves_what_one_that_is_played_serves(reads: list[int]) -> None:
    sizes = np.arange(15)
    found = served_by_least_recently_used(np.array(reads, np.int64), sizes)
    for size, share in zip(sizes.tolist(), found.tolist(), strict=True):
        cache, hits = OrderedDict[int, None](), 0
        for row in reads:
            hits += row in cache
            cache[row] = None
            cache.move_to_end(row)
            if len(cache) > size:
                cache.popitem(last=False)
        assert share == pytest.approx(hits / max(len(reads), 1))


def test_the_most_read_rows_serve_the_reads_of_them() -> None:
    random = np.random.default_rng(0)
    before, now = random.permutation(50), random.integers(0, 9, 50)
    counts = Counter(dict(enumerate(before.tolist())))
    for size, share in zip(range(51), served_by_most_read(before, now, np.arange(51)).tolist(), strict=True):
        kept = [row for row, _ in counts.most_common(size)]
        assert share == pytest.approx(now[kept].sum() / now.sum() if kept else 0)
