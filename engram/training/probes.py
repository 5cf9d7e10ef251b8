"""Asks a model the questions of synthetic tasks (`engram.synthetic`): is each answer what greedy decoding would write?

A text is a document of its own after one end-of-text token, as in training. Its answers are found by their characters;
one is right if all its tokens are the likeliest ones after the text before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engram.backbone import EngramLM
from engram.backbone.loss import chunk_rows, losses_of
from engram.config import ConfigError
from engram.synthetic.examples import Example


class Question(NamedTuple):
    """An end-of-text token and a text's tokens, up to its last answer; first and one past the last token of answers."""

    ids: list[int]
    answers: list[tuple[int, int]]


class Answers(NamedTuple):
    """What a model did with all answers of some questions, in their order.

    `right` [A] bool; `nats` [A] float64, minus the log-probability of the whole answer; `question` [A] the number of
    each answer's question.
    """

    right: NDArray[np.bool_]
    nats: NDArray[np.float64]
    question: NDArray[np.int64]


class Score(NamedTuple):
    """Of some answers: how many, the share of right ones, nats an answer, and the accuracy of a guess."""

    n: int
    accuracy: float
    nats: float
    chance: float


def questions_of(examples: Sequence[Example], tokenizer: Tokenizer, eos: int) -> list[Question]:
    """Examples as a model reads them. Raises `ConfigError` for an answer without tokens, or one that shares a token."""
    tokenizer.encode_special_tokens = True
    encodings = tokenizer.encode_batch([example.text for example in examples], add_special_tokens=False)
    questions = []
    for example, encoding in zip(examples, encodings, strict=True):
        answers = [_span(example.text, answer, encoding.offsets) for answer in example.answers]
        questions.append(Question([eos, *encoding.ids[: answers[-1][1] - 1]], answers))
    return questions


def _span(text: str, answer: tuple[int, int], offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """First token of an answer to one past the last, the end-of-text token in front counted.

    Of what a token also covers, white space alone is allowed.
    """
    start, end = answer
    inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
    if not inside:
        raise ConfigError(f"answer {text[start:end]!r}: the tokenizer has no token for it")
    first, last = offsets[inside[0]][0], offsets[inside[-1]][1]
    if (text[first:start] + text[end:last]).strip():
        raise ConfigError(f"answer {text[start:end]!r}: the tokenizer joins it with other text: {text[first:last]!r}")
    return inside[0] + 1, inside[-1] + 2


@torch.no_grad()
def ask(
    model: EngramLM, questions: Sequence[Question], batch_size: int = 32, *, rank: int = 0, n_ranks: int = 1
) -> Answers:
    """The answers of `model`, which is in evaluation mode, on its device and in the precision that autocast sets.

    With `n_ranks`, which must all call this at the same time with the same questions, each reads its share of every
    `n_ranks * batch_size` questions, and the results are put together. They depend on neither number but for rounding.
    Texts are read whole, also where they are longer than those the model was trained on.
    """
    device = model.embed.weight.device
    of = np.repeat(np.arange(len(questions)), [len(question.answers) for question in questions])
    first_answer = np.searchsorted(of, np.arange(len(questions)))
    wrong_and_nats = torch.zeros(len(of), 2, dtype=torch.float64, device=device)
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].ids), reverse=True)
    for at in range(0, len(order), batch_size * n_ranks):
        batch = order[at : at + batch_size * n_ranks]
        mine = batch[rank::n_ranks]
        # All ranks run all batches, in one shape, also those that have fewer questions.
        ids = torch.zeros(-(-len(batch) // n_ranks), len(questions[batch[0]].ids) - 1, dtype=torch.int64)
        tokens = []  # of answers: row, place of the state that predicts it, its id, number of its answer
        for row, i in enumerate(mine):
            question = torch.tensor(questions[i].ids)
            ids[row, : len(question) - 1] = question[:-1]
            for number, (first, end) in enumerate(questions[i].answers, start=first_answer[i]):
                tokens += [(row, t - 1, questions[i].ids[t], number) for t in range(first, end)]
        documents = (torch.arange(ids.shape[1]) > 0).long().expand(ids.shape)  # the end of text ends one of its own
        hidden = model.run(ids.to(device), documents.to(device)).hidden
        chosen = torch.tensor(tokens, dtype=torch.int64, device=device).reshape(len(tokens), 4)
        for some in chosen.split(chunk_rows(model.head_weight)):
            row, place, target, answer = some.T
            logits = model.logits(hidden[row, place])
            wrong, nats = logits.argmax(-1) != target, losses_of(logits, target)
            wrong_and_nats.index_add_(0, answer, torch.stack([wrong, nats], 1).double())
    if n_ranks > 1:
        torch.distributed.all_reduce(wrong_and_nats)
    wrong, nats = wrong_and_nats.T.cpu().numpy()
    return Answers(wrong == 0, nats, of)


def score(examples: Sequence[Example], answers: Answers, chosen: NDArray[np.bool_] | None = None) -> Score:
    """Of the answers to some examples, all or those `chosen` [A]. Not a number where there are none."""
    chosen = np.ones(len(answers.right), bool) if chosen is None else chosen
    chance = np.array([example.chance for example in examples])[answers.question]
    n = int(chosen.sum())
    means = [float(values[chosen].sum() / n) if n else np.nan for values in (answers.right, answers.nats, chance)]
    return Score(n, *means)


def answers_by_group(
    examples: Sequence[Example], answers: Answers
) -> dict[tuple[str, int | float | str], NDArray[np.bool_]]:
    """Which answers `[A]` have each value of each name of the examples' groups, such as `("exposures", 4)`."""
    groups = [set(example.group) for example in examples]
    values = dict.fromkeys(value for example in examples for value in example.group)
    return {value: np.array([value in group for group in groups])[answers.question] for value in values}
