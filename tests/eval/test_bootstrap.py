import numpy as np
import pytest
from asking import scipys_interval

from eval.shared.bootstrap import ratios, sums_by_document


def test_sums_by_document_are_those_of_a_loop() -> None:
    random = np.random.default_rng(1)
    documents, values = random.integers(3, 9, 50) * 7, random.normal(size=(50, 2))
    wanted = [sum(v for d, v in zip(documents, values, strict=True) if d == n) for n in sorted(set(documents.tolist()))]
    np.testing.assert_allclose(sums_by_document(documents, values), wanted)


def test_intervals_agree_with_scipys_bootstrap_of_the_same_ratio() -> None:
    random = np.random.default_rng(2)
    tokens = random.integers(5, 200, 40).astype(float)
    nats = tokens * random.normal(3.0, 0.4, 40)
    (found,) = ratios(nats[:, None], tokens[:, None])
    theirs = scipys_interval(nats, tokens)
    assert found.value == pytest.approx(nats.sum() / tokens.sum())
    spread = theirs.high - theirs.low
    assert found.low == pytest.approx(theirs.low, abs=0.1 * spread)
    assert found.high == pytest.approx(theirs.high, abs=0.1 * spread)


@pytest.mark.parametrize("n", [6, 30])
def test_intervals_hold_the_truth_as_often_as_they_say(n: int) -> None:
    """Of few documents too, where plain percentiles do in 86 of 100 cases."""
    random = np.random.default_rng(4)
    hits = 0
    for _ in range(400):
        effect = random.normal(size=(n, 1))  # tokens of a document are alike: one effect for all of its 50
        (found,) = ratios((effect * 50), np.full((n, 1), 50.0), draws=800)
        hits += found.low <= 0 <= found.high
    assert 0.91 <= hits / 400 <= 0.98


def test_what_one_document_alone_tells_of_has_no_interval() -> None:
    known, unknown, none = ratios(np.array([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), np.array([[1.0, 1, 0], [1, 0, 0]]))
    assert (known.value, unknown.value) == (2.0, 2.0)
    assert known.low < known.high
    assert np.isnan([unknown.low, unknown.high, none.value, none.low]).all()
