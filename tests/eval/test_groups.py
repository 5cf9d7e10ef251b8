"""Sums and means of groups, against plain loops and scipy's bootstrap."""

from collections import defaultdict

import numpy as np
import pytest
from asking import scipys_interval
from scipy import stats

from eval.shared.groups import Groups, Kind, all_tokens


def _text(seed: int) -> tuple[np.ndarray, list[Kind], np.ndarray]:
    random = np.random.default_rng(seed)
    documents = np.repeat([3, 4, 9, 10, 12], [40, 1, 300, 70, 89])
    colour = np.where(documents == 9, 2, random.integers(0, 2, 500))
    kinds = [all_tokens(500), Kind("colour", ["red", "green", "blue", "none"], colour)]
    return documents, kinds, random.normal(size=(500, 2, 3))


def test_sums_are_those_of_a_loop_and_the_same_in_parts_of_any_size() -> None:
    documents, kinds, values = _text(0)
    groups = Groups(documents, kinds)
    assert list(zip(groups.kinds, groups.names, strict=True)) == [
        ("all", "all tokens"),
        ("colour", "red"),
        ("colour", "green"),
        ("colour", "blue"),
    ]
    wanted = defaultdict(lambda: np.zeros((2, 3)))
    for document, colour, value in zip(documents.tolist(), kinds[1].of.tolist(), values, strict=True):
        wanted[document, "all tokens"] += value
        wanted[document, kinds[1].groups[colour]] += value
    sums = groups.summed([values])
    for d, document in enumerate((3, 4, 9, 10, 12)):
        for g, name in enumerate(groups.names):
            np.testing.assert_allclose(sums[d, g], wanted[document, name], atol=1e-12)
    for size in (1, 7, 499):
        parts = [values[start : start + size] for start in range(0, 500, size)]
        assert np.array_equal(groups.summed(parts), sums)


def test_groups_say_how_many_tokens_documents_and_numbers_they_have() -> None:
    documents, kinds, _ = _text(1)
    numbers = np.random.default_rng(1).integers(0, 60, 500)
    groups = Groups(documents, kinds)
    members = [np.ones(500, bool), *(kinds[1].of == i for i in range(3))]
    assert groups.described() == [
        {"kind": kind, "name": name, "tokens": int(who.sum()), "documents": len(set(documents[who].tolist()))}
        for kind, name, who in zip(groups.kinds, groups.names, members, strict=True)
    ]
    assert groups.distinct(numbers) == [len(set(numbers[who].tolist())) for who in members]


def test_means_of_a_group_that_some_documents_have_are_drawn_over_all_documents_as_scipy_draws_them() -> None:
    random = np.random.default_rng(2)
    lengths = random.integers(5, 80, 60)
    documents = np.repeat(np.arange(60), lengths)
    rare = (documents % 5 == 0) & (random.random(len(documents)) < 0.5)
    values = random.normal(size=60)[documents] + random.normal(size=len(documents))
    groups = Groups(documents, [all_tokens(len(documents)), Kind("rare", ["no", "yes"], rare.astype(np.int64))])
    found = dict(zip(groups.names, groups.mean(groups.summed([values])), strict=True))
    assert found["yes"].value == pytest.approx(values[rare].mean())
    sums, n = (np.bincount(documents, each * rare) for each in (values, np.ones(len(documents))))
    theirs = scipys_interval(sums, n)
    # Ours reaches further, as 12 documents are few.
    wider = (found["yes"].high - found["yes"].low) / (theirs.high - theirs.low)
    assert wider == pytest.approx(np.sqrt(12 / 11) * stats.t.ppf(0.975, 11) / stats.norm.ppf(0.975), rel=0.12)


def test_the_interval_of_a_group_in_few_of_many_documents_holds_the_truth_as_often_as_it_says() -> None:
    random, hits = np.random.default_rng(4), 0
    documents = np.repeat(np.arange(60), 20)
    for _ in range(200):
        has = np.sort(random.permutation(60)[:10])
        group = np.isin(documents, has) & (random.random(1200) < 0.6)
        values = random.normal(size=60)[documents]
        groups = Groups(documents, [Kind("some", ["no", "yes"], group.astype(np.int64))])
        found = groups.mean(groups.summed([values]))[1]
        hits += found.low <= 0 <= found.high
    assert 0.90 <= hits / 200 <= 0.99
