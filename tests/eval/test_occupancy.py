from itertools import product

import numpy as np
import pytest

from eval.shared.occupancy import occupied, shared


@pytest.mark.parametrize(("n_balls", "n_bins"), [(1, 3), (2, 2), (3, 2), (4, 3), (5, 4), (3, 1)])
def test_moments_are_those_of_all_ways_to_throw(n_balls: int, n_bins: int) -> None:
    weights = np.arange(1, n_balls + 1) ** 2
    values, hit = [], []
    for throw in product(range(n_bins), repeat=n_balls):
        crowded = [throw.count(b) > 1 for b in throw]
        values.append(sum(w for w, c in zip(weights.tolist(), crowded, strict=True) if c) / weights.sum())
        found = shared(np.array(throw), weights, n_bins)
        assert found.value == pytest.approx(values[-1])
        hit.append(len(set(throw)))
    assert found.expected == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values), abs=1e-9)
    assert occupied(n_balls, n_bins) == pytest.approx(np.mean(hit))


def test_random_throws_lie_within_the_stated_deviation() -> None:
    random = np.random.default_rng(0)
    weights = random.zipf(2.0, 5000).clip(max=500)
    z = []
    for _ in range(200):
        found = shared(random.integers(0, 7001, 5000), weights, 7001)
        z.append((found.value - found.expected) / found.sd)
    assert abs(np.mean(z)) < 0.25
    assert 0.8 < np.std(z) < 1.2
