"""Counts of N-grams against Python's `Counter` of tuples, for keys that hold all ids and for chains of them."""

from collections import Counter

import numpy as np
import pytest
from asking import suffixes

from eval.shared import ngrams
from eval.shared.ngrams import Counts, Suffixes

# Vocabularies whose 2-, 3- and 5-grams fit in one key of 63 bits, or not.
SIZES = (6, 2**20, 2**31)


def _text(random: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Few different ids of a large vocabulary, its largest among them."""
    ids = (size - 1 - random.zipf(1.5, (30, 12)).clip(max=5)) % size
    return ids, np.cumsum(random.random((30, 12)) < 0.2, 1)


def _plain(ids: np.ndarray, documents: np.ndarray, order: int, times: np.ndarray) -> Counter[tuple[int, ...]]:
    found: Counter[tuple[int, ...]] = Counter()
    for row, own, n in zip(ids, documents, times.tolist(), strict=True):
        for gram in suffixes(row, own, order, 0, _Same()):
            found[gram] += n
    return found


class _Same:
    def __getitem__(self, i: int) -> int:
        return i


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_times_in_another_text_are_those_of_a_counter(size: int, order: int) -> None:
    random = np.random.default_rng(order)
    known, other = _text(random, size), _text(random, size)
    times = random.integers(1, 4, 30)
    grams = Suffixes(order, 0, size)
    grams.add(*known)
    found, n = grams.times(*other, times)
    wanted, ids = _plain(*other, order, times), grams.ids()
    here = set(_plain(*known, order, times))
    assert {tuple(ids[i].tolist()): int(k) for i, k in zip(found, n, strict=True)} == {
        gram: k for gram, k in wanted.items() if gram in here
    }
    assert 0 < len(found) < len(wanted) or order < 3


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("pending", [10, 10**6])
def test_all_n_grams_of_a_text_that_grows_are_counted(
    size: int, order: int, pending: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngrams, "_PENDING", pending)
    random, grams, counts = np.random.default_rng(order), Suffixes(order, 0, size), Counts()
    wanted: Counter[tuple[int, ...]] = Counter()
    for _ in range(6):
        text, times = _text(random, size), random.integers(1, 3, 30)
        counts.add(grams.keys(*text), times)
        wanted += _plain(*text, order, times)
        assert counts.all()[1].sum() == wanted.total()
    keys, n = counts.all()
    assert (np.diff(keys) > 0).all()
    assert {tuple(gram): k for gram, k in zip(grams.ids_of(keys).tolist(), n.tolist(), strict=True)} == wanted
    assert not len(Counts().all()[0])
