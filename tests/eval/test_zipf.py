import numpy as np
import pytest

from eval.shared.zipf import zipf


@pytest.mark.parametrize("exponent", [0.7, 1.2])
def test_the_exponent_of_a_power_law_is_found_whatever_the_order(exponent: float) -> None:
    counts = np.round(1e6 / np.arange(1, 20001) ** exponent).astype(np.int64)
    shuffled = np.random.default_rng(0).permutation(np.append(counts, [0] * 99))
    found = zipf(shuffled)
    assert found.exponent == pytest.approx(exponent, abs=0.01)
    assert (found.first, found.last) == (10, (counts >= 10).sum())
    assert found.reads.tolist() == counts[found.ranks - 1].tolist()
    assert (found.ranks[0], found.ranks[-1]) == (1, (counts > 0).sum())


def test_too_few_reads_have_no_exponent() -> None:
    assert zipf(np.array([5, 0, 3])).exponent is None
    assert len(zipf(np.zeros(4, np.int64)).ranks) == 0
