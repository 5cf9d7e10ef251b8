"""Induction: a stretch of random words comes again, and has to be copied from where it came before.

The classic test of induction heads (arXiv:2209.11895): no knowledge of words helps, as stretches are random and the
nonce words of tests are in none of its training documents (some may be names in those of `facts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from engram.config import require
from engram.synthetic.examples import Example, Task
from engram.synthetic.words import COMMON, nonce_words


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Texts of random words, nonce or common ones, in which a stretch of words comes again.

    Training documents have `n_words` words: a stretch of 3 to `longest`, then some other words, none among them, and
    the stretch again, as often as there is room. In tests a stretch of `longest` words comes twice, after as many other
    words as make up `n_words` and with one of `gaps` words between. The copy's first word can't be known and is not
    asked for. All words are different but for the copies; a guess is one of the different words so far.
    """

    name: ClassVar[str] = "induction"
    n_words: int = 24
    longest: int = 6
    gaps: tuple[int, ...] = (0, 4, 12)

    def __post_init__(self) -> None:
        require(self.longest >= 3, "induction.longest", self.longest, "3 or more")
        require(len(self.gaps) > 0 and min(self.gaps) >= 0, "induction.gaps", self.gaps, "numbers of words, 0 or more")
        least, most = 2 * self.longest + max(self.gaps), len(COMMON)
        allowed = f"{least}, two stretches and the widest gap, to {most}"
        require(least <= self.n_words <= most, "induction.n_words", self.n_words, allowed)

    def training(self, n_bytes: int, seed: int) -> Iterator[str]:
        """Documents of nonce words and of common ones by turns."""
        random, common = Random(f"induction {seed}"), False
        while n_bytes > 0:
            words, common = self._words(random, common, part=0), not common
            stretch = [words.pop() for _ in range(random.randint(3, self.longest))]
            said = list(stretch)
            while len(said) < self.n_words:
                gap = random.choice((0, 0, random.randint(1, self.n_words)))
                said += [words.pop() for _ in range(min(gap, len(words)))] + stretch
            text = " ".join(said[: self.n_words]) + "\n"
            n_bytes -= len(text)
            yield text

    def test(self, n: int, n_bytes: int, seed: int) -> Sequence[Example]:
        """Texts of other stretches, and of other nonce words: equally many of each gap and kind of word."""
        random = Random(f"induction test {seed}")
        cells = [(gap, kind) for gap in self.gaps for kind in ("nonce", "common")]
        return [self._example(random, gap, kind) for gap, kind in cells for _ in range(-(-n // len(cells)))]

    def _example(self, random: Random, gap: int, kind: str) -> Example:
        words = self._words(random, kind == "common", part=1)[: self.n_words - self.longest]
        first = len(words) - gap - self.longest
        stretch = words[first : first + self.longest]
        start, answers = len(" ".join([*words, stretch[0]])) + 1, []
        for word in stretch[1:]:
            answers.append((start, start + len(word)))
            start += len(word) + 1
        group = (("gap", gap), ("words", kind))
        return Example(" ".join(words + stretch), tuple(answers), group, 1 / len(words))

    def _words(self, random: Random, common: bool, part: int) -> list[str]:
        """Different ones, as many as a text can need."""
        if common:
            return random.sample(COMMON, self.n_words)
        return nonce_words(self.n_words, random, part=part, parts=2)
