"""Facts: told as often as they say, of entities whose names tell as much of them as they say."""

from collections import Counter

import numpy as np
import pytest

from engram.synthetic.facts import SIBLINGS, VALUES, Fact, Facts

BYTES = 400_000


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return Facts().facts(BYTES, 0)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return list(Facts().training(BYTES, 0))


def test_each_fact_is_told_its_number_of_times_and_never_twice_in_a_document(
    facts: list[Fact], documents: list[str]
) -> None:
    said = Counter(line for text in documents for line in text.splitlines())
    in_documents = Counter(line for text in documents for line in {*text.splitlines()})
    assert {fact.exposures for fact in facts} == {0, 1, 4, 16, 64}
    for fact in facts:
        ways = [fact.sentence(0), fact.sentence(1)]
        assert sum(said[way] for way in ways) == sum(in_documents[way] for way in ways) == fact.exposures
        assert fact.exposures < 64 or min(said[way] for way in ways) > 10
        assert all(f"{fact.entity} " in way and f" {fact.value}." in way for way in ways)
    assert said.total() == sum(fact.exposures for fact in facts)


def test_a_fact_has_different_neighbours_each_time(facts: list[Fact], documents: list[str]) -> None:
    often = next(fact for fact in facts if fact.exposures == 64)
    neighbours = Counter(
        line for text in documents if often.entity in text for line in text.splitlines() if often.entity not in line
    )
    assert neighbours.total() > 100
    assert neighbours.most_common(1)[0][1] <= 12


def test_entities_differ_and_controls_are_named_nowhere(facts: list[Fact], documents: list[str]) -> None:
    assert len({fact.entity for fact in facts}) == len(facts)
    whole = "".join(documents)
    controls = [fact for fact in facts if fact.exposures == 0]
    assert len(controls) == len(facts) // 5
    assert not any(fact.entity in whole for fact in controls)
    for example in Facts().test(10**6, BYTES, 0):
        assert example.control == (("exposures", 0) in example.group)


def test_own_family_names_tell_an_entity_and_shared_ones_do_not(facts: list[Fact]) -> None:
    of_family = Counter(fact.entity.split()[1] for fact in facts)
    of_given = Counter(fact.entity.split()[0] for fact in facts if fact.names == "shared")
    shared = [of_family[fact.entity.split()[1]] for fact in facts if fact.names == "shared"]
    assert {of_family[fact.entity.split()[1]] for fact in facts if fact.names == "own"} == {1}
    assert np.mean(shared) > SIBLINGS - 1
    assert max(shared) == max(of_given.values()) == SIBLINGS


@pytest.mark.parametrize("word", [0, 1])
def test_one_of_two_shared_names_leaves_open_who_of_those_that_have_it_is_meant(word: int) -> None:
    whole = 0
    for seed in range(3):
        sharing: dict[str, list[Fact]] = {}
        for fact in Facts().facts(BYTES, seed):
            if fact.names == "shared":
                sharing.setdefault(fact.entity.split()[word], []).append(fact)
        for family in sharing.values():
            assert len({fact.value for fact in family}) == len(family)
            assert len({(fact.place, fact.relation, fact.exposures) for fact in family}) == 1
            whole += len(family) == SIBLINGS
        assert len({tuple(fact.value for fact in family) for family in sharing.values()}) > 0.9 * len(sharing)
    assert whole > 100


@pytest.mark.parametrize("n_bytes", [400, 30_000, 100_000])
def test_few_facts_have_names_too(n_bytes: int) -> None:
    facts = Facts(exposures=(1, 2)).facts(n_bytes, 0)
    assert len({fact.entity for fact in facts}) == len(facts) >= 12


def test_values_are_even() -> None:
    many = [fact for seed in range(20) for fact in Facts().facts(BYTES, seed)]
    for relation, values in VALUES.items():
        counts = Counter(fact.value for fact in many if fact.relation == relation)
        expected = counts.total() / 16
        assert counts.keys() == set(values.split())
        assert sum((n - expected) ** 2 / expected for n in counts.values()) < 45  # chi-squared of 15, p < 1e-4


def test_near_facts_end_with_the_entity_and_its_value_and_far_ones_with_the_same_words(facts: list[Fact]) -> None:
    endings = Counter()
    for fact in facts:
        for way in (0, 1):
            before = fact.sentence(way).removesuffix(f" {fact.value}.")
            assert before.endswith(fact.entity) == (fact.place == "near")
            assert before.startswith(fact.entity) == (fact.place == "far")
            endings[fact.place, " ".join(before.split()[-2:])] += 1
    assert len([ending for place, ending in endings if place == "far"]) == 2
