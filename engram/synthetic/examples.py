"""What a synthetic task gives: a text, and where in it the answers stand that a model has to predict.

Tasks write plain text and know no tokenizer; whoever scores a model finds the tokens of an answer by its characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple, Protocol


class Example(NamedTuple):
    """A text with answers.

    answers: spans of characters in `text`, first to one past the last, in order; a model is to predict each from all
    that stands before it. group: what accuracies are told apart by, such as `(("exposures", 4),)`. chance: share of its
    answers that somebody gets right who knows the format and guesses. control: left out of the task's score, as its
    answers are no matter of the ability: nobody can know them, or training told them word for word.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    group: tuple[tuple[str, int | float | str], ...] = ()
    chance: float = 0.0
    control: bool = False


class Task(Protocol):
    """A task with documents to train on, and questions that those do not answer word for word."""

    name: ClassVar[str]

    def check(self, n_bytes: int) -> None:
        """Raise `ConfigError` if the task can't make so many bytes of documents, 1 or more; most can make any number,
        the last document as long as it gets."""

    def training(self, n_bytes: int, seed: int) -> Iterator[str]:
        """Documents of about `n_bytes` in sum; the same ones for the same arguments."""

    def test(self, n: int, n_bytes: int, seed: int) -> Sequence[Example]:
        """About `n` examples for a model that was trained on `training(n_bytes, seed)`, all groups among them."""
