"""Fact recall: who has which colour, animal, town or trade, told some exact number of times and asked once.

Made after bioS of "Physics of Language Models" (arXiv:2309.14316, arXiv:2404.05405), where each attribute of a
made-up person is drawn evenly from a closed set, so that what is recalled beyond chance was stored by the model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from random import Random
from typing import ClassVar, NamedTuple

from engram.config import require
from engram.synthetic.examples import Example, Task
from engram.synthetic.words import most_words, nonce_words

VALUES = {
    "colour": "red blue green black white brown pink grey gold silver purple orange yellow violet scarlet ivory",
    "animal": "dog cat horse cow wolf bear fox lion goat sheep mouse eagle snake whale tiger rabbit",
    "town": "paris london rome berlin madrid vienna dublin oslo cairo delhi tokyo moscow boston lima prague athens",
    "trade": "baker smith farmer doctor teacher lawyer painter tailor singer miner sailor pilot cook clerk judge guard",
}
# The entity right before the value, so that the last tokens tell it; or at the start, with the same words after it.
TEMPLATES = {
    "near": ("List of {relation}s by name: {entity} {value}.", "Their {relation}, as we heard: {entity} {value}."),
    "far": (
        "{entity} told us in passing that the one {relation} to remember must be {value}.",
        "{entity} wrote in a letter home that no {relation} is quite like {value}.",
    ),
}
SIBLINGS = 4  # entities of a clan that share a given name, and as many that share a family name


class Fact(NamedTuple):
    """What is told of an entity, which has no other fact.

    place: of the entity in the sentence, a key of `TEMPLATES`. names: `own`, a family name that no other entity has, or
    `shared`, where only given and family name together tell the entity.
    """

    entity: str
    relation: str
    value: str
    place: str
    names: str
    exposures: int

    def sentence(self, template: int) -> str:
        """One of the ways to say it."""
        text = TEMPLATES[self.place][template].format(relation=self.relation, entity=self.entity, value=self.value)
        return text[0].upper() + text[1:]


@dataclass(frozen=True, kw_only=True)
class Facts(Task):
    """Facts, of each number of `exposures` equally many; a control is about entities that are never told of.

    What an N-gram table can do here: the row of the last two or three tokens tells a `near` fact with `own` names, as
    far as the tokenizer has the family name in so many tokens. It doesn't tell `far` ones, whose last tokens are the
    same in all sentences: for those a model has to bring the name to where it is needed by attention.

    Entities with `shared` names come in clans: each of four given names goes with each of four family names, all are
    told of in the same relation and as often as each other, and its 16 values are dealt out to them once each. Either
    name alone leaves four values open, and only both tell a fact: more than a quarter right takes the given name as
    well, which stands further away. (The last clan of a kind may be smaller, and leave less open.) A guess knows the
    relation and its 16 values.

    A document tells of about `document_bytes` / 60 facts, and of none twice. There are as many facts of each kind as
    fit into the bytes of all documents: one or more, and no more than there are names for.
    """

    name: ClassVar[str] = "facts"
    exposures: tuple[int, ...] = (1, 4, 16, 64)
    document_bytes: int = 300

    def __post_init__(self) -> None:
        allowed = "different numbers, 1 or more"
        good = len(self.exposures) > 0 and min(self.exposures) >= 1 and len(set(self.exposures)) == len(self.exposures)
        require(good, "facts.exposures", self.exposures, allowed)
        require(self._most >= 1, "facts.exposures", self.exposures, "no more numbers than there are names for")
        require(self.document_bytes >= 1, "facts.document_bytes", self.document_bytes, "1 or more")

    def check(self, n_bytes: int) -> None:
        """Raises `ConfigError` for fewer bytes than tell a fact of each kind, or more than there are names for."""
        half = self._bytes_of_each // 2
        allowed = (
            f"{half + 1:,} to {(2 * self._most + 1) * half - 1:,}: with exposures {self.exposures} those of one fact "
            "of each kind, and of as many as there are names for"
        )
        require(1 <= round(n_bytes / self._bytes_of_each) <= self._most, "facts.bytes", n_bytes, allowed)

    @property
    def _bytes_of_each(self) -> int:
        """Bytes of all sentences about one fact of each kind."""
        return sum(self.exposures) * 2 * len(TEMPLATES) * _MEAN_BYTES

    @property
    def _most(self) -> int:
        """How many facts of each kind there are names for."""
        most = most_words()
        return bisect_right(range(most), most, key=lambda n: sum(self._names(n))) - 1

    def _names(self, n: int) -> tuple[int, int, int]:
        """Given names of clans, their family names, and family names of one entity each, for n facts of each kind."""
        n_cells = len(TEMPLATES) * (1 + len(self.exposures))
        of_clans = SIBLINGS * -(-n // SIBLINGS**2) * n_cells
        return of_clans, of_clans, n * n_cells

    def facts(self, n_bytes: int, seed: int) -> list[Fact]:
        """All that are told in `n_bytes` of documents, and a control for each of one number of exposures.

        Raises `ConfigError` as `check`.
        """
        self.check(n_bytes)
        cells = [(place, level) for place in TEMPLATES for level in (0, *self.exposures)]
        n = round(n_bytes / self._bytes_of_each)
        clans = -(-n // SIBLINGS**2)
        n_clan, _, _ = names = self._names(n)
        random = Random(f"facts {seed}")
        words = [word.title() for word in nonce_words(sum(names), random)]
        given, family, own = words[:n_clan], iter(words[n_clan : 2 * n_clan]), iter(words[2 * n_clan :])
        clan_given = iter(given)
        facts = []
        for place, level in cells:
            for _ in range(n):
                relation = random.choice(list(VALUES))
                value = random.choice(VALUES[relation].split())
                facts.append(Fact(f"{random.choice(given)} {next(own)}", relation, value, place, "own", level))
            deal = [_clan([*islice(clan_given, SIBLINGS)], [*islice(family, SIBLINGS)], random) for _ in range(clans)]
            facts.extend(Fact(*told, place, "shared", level) for told in islice(chain(*deal), n))
        return facts

    def training(self, n_bytes: int, seed: int) -> Iterator[str]:
        """Documents in which each fact is told as often as its exposures say."""
        facts, random = self.facts(n_bytes, seed), Random(f"facts told {seed}")
        told = sum(fact.exposures for fact in facts)
        n = max(round(told * _MEAN_BYTES / self.document_bytes), *self.exposures)
        documents: list[list[str]] = [[] for _ in range(n)]
        for fact in facts:
            for document in random.sample(documents, fact.exposures):
                document.append(fact.sentence(random.randrange(2)))
        for document in documents:
            random.shuffle(document)
            if document:
                yield "\n".join(document) + "\n"

    def test(self, n: int, n_bytes: int, seed: int) -> Sequence[Example]:
        """One question about each fact, or about as many of each kind and number of exposures."""
        facts, random = self.facts(n_bytes, seed), Random(f"facts asked {seed}")
        kinds: dict[tuple[str, str, int], list[Fact]] = {}
        for fact in facts:
            kinds.setdefault((fact.place, fact.names, fact.exposures), []).append(fact)
        each = -(-n // len(kinds))
        return [_question(fact, random.randrange(2)) for members in kinds.values() for fact in members[:each]]


_MEAN_BYTES = 65  # of a sentence


def _clan(given: Sequence[str], family: Sequence[str], random: Random) -> list[tuple[str, str, str]]:
    """Entity, relation and value of all that can be made of these names, family by family."""
    relation = random.choice(list(VALUES))
    values = random.sample(VALUES[relation].split(), len(given) * len(family))
    entities = [f"{first} {last}" for last in family for first in given]
    return [(entity, relation, value) for entity, value in zip(entities, values, strict=True)]


def _question(fact: Fact, template: int) -> Example:
    sentence = fact.sentence(template)
    end = sentence.rindex(fact.value) + len(fact.value)
    group = (("exposures", fact.exposures), ("place", fact.place), ("names", fact.names))
    chance = 1 / len(VALUES[fact.relation].split())
    return Example(sentence[:end], ((end - len(fact.value), end),), group, chance, control=fact.exposures == 0)
