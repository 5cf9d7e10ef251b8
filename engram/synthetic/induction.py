"""Induction: a stretch of random words comes a second time, and has to be copied from the first.

The classic test of induction heads (arXiv:2209.11895): no knowledge of words helps, as those of tests are in no
training document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from engram.config import require
from engram.synthetic.examples import Example
from engram.synthetic.words import nonce_words


@dataclass(frozen=True, kw_only=True)
class Induction:
    """Texts of `n_words` different nonce words, in which `segment` of them come again at the end, in their order.

    The first word of the copy can't be known and is not asked for. A guess is one of the different words so far.
    """

    name: ClassVar[str] = "induction"
    n_words: int = 20
    segment: int = 6
    gaps: tuple[int, ...] = (0, 4, 12)  # words between a stretch and its copy

    def __post_init__(self) -> None:
        require(self.segment >= 2, "induction.segment", self.segment, "2 or more")
        require(len(self.gaps) > 0 and min(self.gaps) >= 0, "induction.gaps", self.gaps, "numbers of words, 0 or more")
        least = self.segment + max(self.gaps)
        require(self.n_words >= least, "induction.n_words", self.n_words, f"{least}, segment and widest gap, or more")

    def training(self, n_bytes: int, seed: int) -> Iterator[str]:
        """Documents with a gap of any width."""
        random = Random(f"induction {seed}")
        while n_bytes > 0:
            text = self._example(random, random.randint(0, self.n_words - self.segment), part=0).text + "\n"
            n_bytes -= len(text)
            yield text

    def test(self, n: int, n_bytes: int, seed: int) -> Sequence[Example]:
        """Texts of other words, equally many of each gap."""
        random = Random(f"induction test {seed}")
        each = -(-n // len(self.gaps))
        return [self._example(random, gap, part=1) for gap in self.gaps for _ in range(each)]

    def _example(self, random: Random, gap: int, part: int) -> Example:
        words = nonce_words(self.n_words, random, part=part, parts=2)
        first = self.n_words - gap - self.segment
        words += words[first : first + self.segment]
        text, answers = "", []
        for i, word in enumerate(words):
            if i > self.n_words:
                answers.append((len(text), len(text) + len(word)))
            text += word + " "
        return Example(text[:-1], tuple(answers), (("gap", gap),), 1 / self.n_words)
