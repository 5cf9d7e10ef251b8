"""Multi-query associative recall: keys with their values, then the keys again in another order, each with its value.

MQAR of Zoology (arXiv:2312.04927), in words. Which key has which value is drawn anew in each document, so there is
nothing to store: a model must find the key in its context, which is attention's work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from engram.config import require
from engram.synthetic.examples import Example, Task
from engram.synthetic.words import COMMON

KEYS, VALUES = COMMON[0::2], COMMON[1::2]


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Documents of as many pairs as one of `pairs` says, and `rounds` queries for each. A guess is one of their values.

    A test asks for each key once at most; an answer's distance is the number of pairs between a key's value and its
    query.
    """

    name: ClassVar[str] = "recall"
    pairs: tuple[int, ...] = (2, 4, 8)
    rounds: int = 2

    def __post_init__(self) -> None:
        allowed = f"numbers of pairs, 2 to {len(VALUES)}"
        good = len(self.pairs) > 0 and min(self.pairs) >= 2 and max(self.pairs) <= len(VALUES)
        require(good, "recall.pairs", self.pairs, allowed)
        require(self.rounds >= 1, "recall.rounds", self.rounds, "1 or more")

    def training(self, n_bytes: int, seed: int) -> Iterator[str]:
        """Documents of each number of pairs."""
        random = Random(f"recall {seed}")
        while n_bytes > 0:
            text, _ = _document(random, random.choice(self.pairs), self.rounds)
            n_bytes -= len(text)
            yield text

    def test(self, n: int, n_bytes: int, seed: int) -> Sequence[Example]:
        """One query of each of `n` documents, whose text ends there; equally many of each number of pairs."""
        random, examples = Random(f"recall test {seed}"), []
        for pairs in self.pairs:
            for _ in range(-(-n // len(self.pairs))):
                text, queries = _document(random, pairs, rounds=1)
                start, end, distance = random.choice(queries)
                nearest = next(bound for bound in (2, 4, 8, 16, 32, 64) if distance < bound)
                group = (("pairs", pairs), ("distance_below", nearest))
                examples.append(Example(text[:end], ((start, end),), group, 1 / pairs))
        return examples


def _document(random: Random, pairs: int, rounds: int) -> tuple[str, list[tuple[int, int, int]]]:
    """A document, and of each query's value where it stands and how many pairs lie between it and its first mention."""
    values = dict(zip(random.sample(KEYS, pairs), random.sample(VALUES, pairs), strict=True))
    keys = list(values)
    text = "given: " + ", ".join(f"{key} {values[key]}" for key in keys) + "; asked:"
    asked = []
    for i, key in enumerate(key for _ in range(rounds) for key in random.sample(keys, pairs)):
        text += f"{',' if i else ''} {key} "
        asked.append((len(text), len(text) + len(values[key]), pairs - 1 - keys.index(key) + i))
        text += values[key]
    return text + "\n", asked
