"""Brackets: what is still open has to be closed, the last one first.

Strings of nested brackets of several kinds (Dyck-k; arXiv:2010.07515, arXiv:2105.11115) are the textbook case of a
rule that needs a stack: which closer comes next depends on an opener any number of tokens back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from engram.config import require
from engram.synthetic.examples import Example, Task
from engram.synthetic.words import part_of

KINDS = (("(", ")"), ("[", "]"), ("{", "}"), ("<", ">"))
_TEST_SHARE = 8  # one string in so many is for tests


@dataclass(frozen=True, kw_only=True)
class Brackets(Task):
    """Lines of brackets of `KINDS` that open and close at random, a colon, and the closers of those still open.

    Each closer after the colon is an answer; a guess is one of the four. Depth is the number of them. The hash of a
    line says whether it is one for training or for tests.
    """

    name: ClassVar[str] = "brackets"
    depths: tuple[int, ...] = (1, 2, 4, 8, 12)
    length: int = 24  # brackets before the colon, at most
    lines: int = 3

    def __post_init__(self) -> None:
        good = len(self.depths) > 0 and min(self.depths) >= 1
        require(good, "brackets.depths", self.depths, "numbers of open brackets, 1 or more")
        least = max(self.depths) + 2
        require(self.length >= least, "brackets.length", self.length, f"{least}, the largest depth and a pair, or more")
        require(self.lines >= 1, "brackets.lines", self.lines, "1 or more")

    def training(self, n_bytes: int, seed: int) -> Iterator[str]:
        """Documents of a few lines of any depth."""
        random = Random(f"brackets {seed}")
        while n_bytes > 0:
            lines = [self._line(random, random.choice(self.depths), for_test=False)[0] for _ in range(self.lines)]
            text = "\n".join(lines) + "\n"
            n_bytes -= len(text)
            yield text

    def test(self, n: int, n_bytes: int, seed: int) -> Sequence[Example]:
        """Single lines, equally many of each depth."""
        random, examples = Random(f"brackets test {seed}"), []
        for depth in self.depths:
            for _ in range(-(-n // len(self.depths))):
                line, start = self._line(random, depth, for_test=True)
                answers = tuple((i, i + 1) for i in range(start, len(line), 2))
                examples.append(Example(line, answers, (("depth", depth),), 1 / len(KINDS)))
        return examples

    def _line(self, random: Random, depth: int, for_test: bool) -> tuple[str, int]:
        """A line that leaves `depth` brackets open, and where the first of their closers stands."""
        while True:
            n_pairs = random.randint(1, (self.length - depth) // 2)
            before, after = _nested(random, depth, n_pairs)
            question = " ".join(before) + " : "
            if (part_of(question, _TEST_SHARE) == 0) == for_test:
                return question + " ".join(after), len(question)


def _nested(random: Random, depth: int, n_pairs: int) -> tuple[list[str], list[str]]:
    """Brackets of which `n_pairs` are closed and `depth` stay open, in random order, and the closers of the latter."""
    opens, closes = depth + n_pairs, n_pairs
    text: list[str] = []
    open_ones: list[str] = []
    while opens or closes:
        if open_ones and random.random() * (opens + closes) < closes:
            text.append(open_ones.pop())
            closes -= 1
        elif opens:
            opener, closer = random.choice(KINDS)
            text.append(opener)
            open_ones.append(closer)
            opens -= 1
    return text, open_ones[::-1]
