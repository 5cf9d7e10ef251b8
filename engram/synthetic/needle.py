"""Needles in a haystack: facts hidden at chosen depths of a long text, and asked for at its end.

After RULER (arXiv:2404.06654): one needle, one among others, several values of one key, several keys, and variables
that are set to each other in a chain. Keys are nonce words, and those of tests are in none of its training documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar, NamedTuple

from engram.config import require
from engram.synthetic.examples import Example, Task
from engram.synthetic.words import nonce_words

# Frequent in most texts, and no nonce words.
_WHICH = ["first", "last", "next", "new", "old", "small", "large", "main", "other"]
_THING = ["file", "list", "table", "line", "page", "point", "group", "class", "test", "index", "block", "view"]
_DOES = ["follows", "opens", "closes", "reads", "calls", "shows", "starts", "ends"]


class Retrieval(NamedTuple):
    """An example, and for each of its answers how deep the needle is hidden that tells it: 0 is the start of the text,
    1 the end of the haystack."""

    example: Example
    depths: tuple[float, ...]


class Puzzle(NamedTuple):
    """Needles with their depths; what follows the haystack, text and answer in turn; among how many a guess chooses."""

    needles: list[tuple[float, str]]
    asked: list[str]
    choices: int


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """Haystacks in which `needles` numbers or names are hidden. What is hidden, and what is asked for, by kind:

    - `single`: one key's number.
    - `multi_key`: numbers of several keys; that of one.
    - `multi_value`: several numbers of one key; all, in the order of the text.
    - `multi_query`: numbers of several keys; all, key by key.
    - `variable_tracking`: two chains of names, the first of a chain set to a number and each other one to the name
      before; the names of a chain by its number, in the order of the text.

    A guess is one of the numbers or names that are hidden; where there is but one, one of all with so many `digits`.
    Training documents have up to `document_bytes`, evenly spread, as windows cut long ones.
    """

    name: ClassVar[str] = "needle"
    kinds: tuple[str, ...] = ("single", "multi_key", "multi_value", "multi_query", "variable_tracking")
    needles: int = 4
    digits: int = 4
    document_bytes: int = 1000

    def __post_init__(self) -> None:
        known = len(self.kinds) > 0 and set(self.kinds) <= set(_KINDS)
        require(known, "needle.kinds", self.kinds, "some of " + ", ".join(_KINDS))
        require(2 <= self.needles <= 1000, "needle.needles", self.needles, "2 to 1000")
        require(4 <= self.digits <= 18, "needle.digits", self.digits, "4 to 18")
        require(self.document_bytes >= 1, "needle.document_bytes", self.document_bytes, "1 or more")

    def check(self, n_bytes: int) -> None:
        """Raises `ConfigError` where a test has no room in a document: else a run would end at its first validation."""
        puzzles = [self._puzzle(kind, [0.0] * self.n_answers(kind), Random(0), part=1) for kind in self.kinds]
        least = max(_bytes(_written(puzzle, []).text) for puzzle in puzzles)
        allowed = f"{least}, those of the longest question with its needles, or more"
        require(self.document_bytes >= least, "needle.document_bytes", self.document_bytes, allowed)

    def training(self, n_bytes: int, seed: int) -> Iterator[str]:
        """Documents of all kinds, with needles at any depths. Raises `ConfigError` as `check`."""
        self.check(n_bytes)
        random = Random(f"needle {seed}")
        while n_bytes > 0:
            kind, length = random.choice(self.kinds), random.randint(0, self.document_bytes)
            puzzle = self._puzzle(kind, self._any_depths(kind, random), random, part=0)
            found = _filled(puzzle, length, _bytes, random) or _written(puzzle, [])
            n_bytes -= len(found.text) + 1
            yield found.text + "\n"

    def test(self, n: int, n_bytes: int, seed: int) -> Sequence[Example]:
        """Equally many of each kind, with other keys, in haystacks as large as they get in training."""
        random, each = Random(f"needle test {seed}"), -(-n // len(self.kinds))
        return [
            self.retrieval(kind, self._any_depths(kind, random), self.document_bytes, _bytes, random).example
            for kind in self.kinds
            for _ in range(each)
        ]

    def retrieval(
        self, kind: str, depths: Sequence[float], length: int, count: Callable[[str], int], random: Random
    ) -> Retrieval:
        """A question with keys for tests, about needles at `depths`, one for each of `n_answers(kind)`.

        With its answers the text is of at most `length` tokens (or bytes, or whatever `count` counts in a text), and
        there is no room for another sentence. Raises `ConfigError` for a length that is too short for the question.
        """
        depths = tuple(sorted(depths)) if kind in _IN_ORDER else tuple(depths)
        puzzle = self._puzzle(kind, depths, random, part=1)
        example = _filled(puzzle, length, count, random)
        least = count(_written(puzzle, []).text)
        require(example is not None, f"length of {kind} with {self.needles} needles", length, f"{least} or more")
        assert example is not None
        return Retrieval(example._replace(group=(("kind", kind),)), depths)

    def n_answers(self, kind: str) -> int:
        """How many answers a question of a kind has."""
        return 1 if kind in ("single", "multi_key") else self.needles

    def _any_depths(self, kind: str, random: Random) -> list[float]:
        return [random.random() for _ in range(self.n_answers(kind))]

    def _puzzle(self, kind: str, depths: Sequence[float], random: Random, part: int) -> Puzzle:
        require(kind in _KINDS, "kind", kind, "one of " + ", ".join(_KINDS))
        require(len(depths) == self.n_answers(kind), "depths", depths, f"{self.n_answers(kind)} of them")
        keys = nonce_words(2 * self.needles, random, part=part, parts=2)
        first = 10 ** (self.digits - 1)
        numbers = [str(number) for number in random.sample(range(first, 10 * first), self.needles)]
        elsewhere = [random.random() for _ in range(self.needles)]
        return _KINDS[kind](list(depths), elsewhere, keys, numbers)


Maker = Callable[[list[float], list[float], list[str], list[str]], Puzzle]


def _single(depths: list[float], elsewhere: list[float], keys: list[str], numbers: list[str]) -> Puzzle:
    key, number = keys[0], numbers[0]
    asked = [f"What is the number of {key}? The number of {key} is ", number]
    return Puzzle([_told(depths[0], key, number)], asked, 9 * 10 ** (len(number) - 1))


def _multi_key(depths: list[float], elsewhere: list[float], keys: list[str], numbers: list[str]) -> Puzzle:
    needles, asked, _ = _single(depths, elsewhere, keys, numbers)
    others = zip(elsewhere, keys[1:], numbers[1:], strict=False)
    return Puzzle(needles + [_told(*other) for other in others], asked, len(numbers))


def _multi_value(depths: list[float], elsewhere: list[float], keys: list[str], numbers: list[str]) -> Puzzle:
    needles = [_told(depth, keys[0], number) for depth, number in zip(sorted(depths), numbers, strict=True)]
    return Puzzle(needles, _listed(f"What are the numbers of {keys[0]}? They are ", numbers), len(numbers))


def _multi_query(depths: list[float], elsewhere: list[float], keys: list[str], numbers: list[str]) -> Puzzle:
    told = list(zip(depths, keys[: len(numbers)], numbers, strict=True))
    asked = [f"What are the numbers of {', '.join(key for _, key, _ in told)}?"]
    for _, key, number in told:
        asked[-1] += f" The number of {key} is "
        asked += [number, "."]
    return Puzzle([_told(*each) for each in told], asked[:-1], len(numbers))


def _variable_tracking(depths: list[float], elsewhere: list[float], keys: list[str], numbers: list[str]) -> Puzzle:
    n = len(numbers)
    asked = _listed(f"Which names stand for {numbers[0]}? They are ", keys[:n])
    chains = _chain(depths, keys[:n], numbers[0]) + _chain(elsewhere, keys[n:], numbers[1])
    return Puzzle(chains, asked, len(keys))


_KINDS: dict[str, Maker] = {
    "single": _single,
    "multi_key": _multi_key,
    "multi_value": _multi_value,
    "multi_query": _multi_query,
    "variable_tracking": _variable_tracking,
}
_IN_ORDER = ("multi_value", "variable_tracking")  # of the text


def _told(depth: float, key: str, number: str) -> tuple[float, str]:
    return depth, f"The number of {key} is {number}."


def _chain(depths: list[float], names: list[str], number: str) -> list[tuple[float, str]]:
    pairs = zip(sorted(depths), names, [number, *names[:-1]], strict=True)
    return [(depth, f"Let {name} be {value}.") for depth, name, value in pairs]


def _listed(question: str, answers: Sequence[str]) -> list[str]:
    return [part for i, answer in enumerate(answers) for part in (", " if i else question, answer)]


def _filled(puzzle: Puzzle, length: int, count: Callable[[str], int], random: Random) -> Example | None:
    """With as many sentences about nothing as there is room for; None if there is none for the question alone."""
    room, noise = length - count(_written(puzzle, []).text), []
    if room < 0:
        return None
    while room > 0:
        noise.append(_about_nothing(random))
        room -= count(" " + noise[-1])
    # Tokens of parts need not add up to those of the whole, which decides.
    while noise and count(_written(puzzle, noise).text) > length:
        noise.pop()
    while count(_written(puzzle, more := [*noise, _about_nothing(random)]).text) <= length:
        noise = more
    return _written(puzzle, noise)


def _written(puzzle: Puzzle, noise: Sequence[str]) -> Example:
    hidden: list[list[str]] = [[] for _ in range(len(noise) + 1)]
    for depth, sentence in puzzle.needles:
        hidden[round(depth * len(noise))].append(sentence)
    sentences = [sentence for before, after in zip(hidden, [*noise, ""], strict=True) for sentence in (*before, after)]
    text, answers = " ".join(sentences[:-1]) + "\n", []
    for i, part in enumerate(puzzle.asked):
        if i % 2:
            answers.append((len(text), len(text) + len(part)))
        text += part
    return Example(text, tuple(answers), chance=1 / puzzle.choices)


def _about_nothing(random: Random) -> str:
    which, thing, does = (random.choice(words) for words in (_WHICH, _THING, _DOES))
    return f"The {which} {thing} {does} the {random.choice(_WHICH)} {random.choice(_THING)}."


def _bytes(text: str) -> int:
    return len(text.encode())
