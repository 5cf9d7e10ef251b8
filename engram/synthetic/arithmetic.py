"""Modular addition: some pairs of numbers are never added in training, and must be computed.

The task in which networks were first seen to learn a rule long after they had learnt their examples by heart
(arXiv:2201.02177, arXiv:2301.05217). Numbers are letters, a = 0, as tokenizers cut those of two digits in different
ways. The N-gram of three tokens that ends at `=` holds one number alone; the one before it, `a + b`, holds both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from string import ascii_lowercase
from typing import ClassVar

from engram.config import require
from engram.synthetic.examples import Example, Task


@dataclass(frozen=True, kw_only=True)
class Arithmetic(Task):
    """Sums modulo `modulus`, `lines` of them a document. A guess is one of the `modulus` results.

    A `held_out` share of the pairs is in no training document, in neither order, as a + b says what b + a is.
    """

    name: ClassVar[str] = "arithmetic"
    modulus: int = 23
    held_out: float = 0.2
    lines: int = 10

    def __post_init__(self) -> None:
        require(3 <= self.modulus <= 26, "arithmetic.modulus", self.modulus, "3 to 26")
        require(0 < self.held_out < 1, "arithmetic.held_out", self.held_out, "between 0 and 1")
        # Before a sum stand two of training with other results: more pairs than one result has, whichever are held out.
        most = self._n_pairs - (self.modulus // 2 + 2)
        allowed = f"between 0 and {most / self._n_pairs:.3f}, so that pairs of several results are left to train on"
        require(self._n_held_out <= most, "arithmetic.held_out", self.held_out, allowed)
        require(self.lines >= 1, "arithmetic.lines", self.lines, "1 or more")

    def pairs(self, seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Pairs of training documents, and those held out, each in both orders."""
        unordered = [(a, b) for a in range(self.modulus) for b in range(a, self.modulus)]
        Random(f"arithmetic pairs {seed}").shuffle(unordered)
        n = self._n_held_out
        seen, held_out = (sorted({*part, *((b, a) for a, b in part)}) for part in (unordered[n:], unordered[:n]))
        return seen, held_out

    @property
    def _n_pairs(self) -> int:
        """Pairs of numbers, order apart."""
        return self.modulus * (self.modulus + 1) // 2

    @property
    def _n_held_out(self) -> int:
        """How many of them are held out."""
        return max(1, round(self.held_out * self._n_pairs))

    def training(self, n_bytes: int, seed: int) -> Iterator[str]:
        """Documents of pairs drawn evenly."""
        (seen, _), random = self.pairs(seed), Random(f"arithmetic {seed}")
        while n_bytes > 0:
            text = "".join(self._line(*random.choice(seen)) for _ in range(self.lines))
            n_bytes -= len(text)
            yield text

    def test(self, n: int, n_bytes: int, seed: int) -> Sequence[Example]:
        """Pairs that were held out, and as many of training as a control, each after two lines of training pairs."""
        (seen, held_out), random = self.pairs(seed), Random(f"arithmetic test {seed}")
        examples = []
        for group, pairs, control in (("seen", seen, True), ("held out", held_out, False)):
            for _ in range(-(-n // 2)):
                a, b = random.choice(pairs)
                others = [pair for pair in seen if sum(pair) % self.modulus != (a + b) % self.modulus]
                before = "".join(self._line(*random.choice(others)) for _ in range(2))
                text = (before + self._line(a, b)).rstrip("\n")
                start = text.rindex(" ") + 1
                examples.append(Example(text, ((start, len(text)),), (("pair", group),), 1 / self.modulus, control))
        return examples

    def _line(self, a: int, b: int) -> str:
        return "so {} + {} = {}\n".format(*(ascii_lowercase[number % self.modulus] for number in (a, b, a + b)))
