"""Haystacks: an independent reader of the text finds every answer, needles lie where they were asked to, no key of a
test was met in training, and a model is right when it writes what that reader does."""

import re
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from engram.config import ConfigError
from engram.synthetic.examples import Example
from engram.synthetic.mixture import mixed_documents, read_mixture
from engram.synthetic.needle import Needle
from engram.training.probes import ask, questions_of
from engram.training.tokenizer import EOS, PAD, train_bpe

TASK = Needle()
TEXTS = list(TASK.training(30_000, 1))
NEEDLE = re.compile(r"The number of (\w+) is (\d+)\.|Let (\w+) be (\w+)\.")


def by_words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    tokenizer.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=[PAD, EOS, "?"]))
    return tokenizer


TOKENIZERS = {"bpe": train_bpe(TEXTS, 400), "words": by_words()}


def counter(name: str) -> Callable[[str], int]:
    return lambda text: len(TOKENIZERS[name].encode(text, add_special_tokens=False).ids)


COUNTS = {"bytes": len, "bpe": counter("bpe"), "words": counter("words")}


def solve(text: str) -> tuple[str, list[str]]:
    """What follows a text up to its question mark, by somebody who can read: all of it, and the answers in it."""
    haystack, question = text.rstrip("?").rsplit("\n", 1)
    found = NEEDLE.findall(haystack)
    told = [(key, number) for key, number, *_ in found if key]
    be = {name: value for *_, name, value in found if name}
    if one := re.fullmatch(r"What is the number of (\w+)", question):
        (answer,) = {number for key, number in told if key == one[1]}
        return f" The number of {one[1]} is {answer}", [answer]
    if number := re.fullmatch(r"Which names stand for (\d+)", question):

        def leads_to(name: str) -> str:
            return leads_to(be[name]) if name in be else name

        names = [name for name in be if leads_to(name) == number[1]]
        return " They are " + ", ".join(names), names
    keys = question.removeprefix("What are the numbers of ").split(", ")
    if len(keys) == 1:
        numbers = [number for key, number in told if key == keys[0]]
        return " They are " + ", ".join(numbers), numbers
    numbers = [dict(told)[key] for key in keys]
    return "".join(f" The number of {key} is {n}." for key, n in zip(keys, numbers, strict=True))[:-1], numbers


def answers_of(example: Example) -> list[str]:
    return [example.text[start:end] for start, end in example.answers]


@st.composite
def asked(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(TASK.kinds))
    n = TASK.n_answers(kind)
    depths = [draw(st.integers(0, 100)) / 100 for _ in range(n)]
    return {"kind": kind, "depths": depths, "random": Random(draw(st.integers(0, 2**32)))}


@settings(max_examples=60, deadline=None)
@given(asked(), st.sampled_from(list(COUNTS)), st.integers(0, 800))
def test_whoever_can_read_finds_every_answer(settings: dict[str, Any], count: str, more: int) -> None:
    example, _ = TASK.retrieval(**settings, length=500 + more, count=COUNTS[count])
    prompt, rest = example.text.rsplit("?", 1)
    assert solve(prompt + "?") == (rest, answers_of(example))
    assert len(answers_of(example)) == TASK.n_answers(settings["kind"])


@settings(max_examples=60, deadline=None)
@given(asked(), st.sampled_from(list(COUNTS)), st.integers(0, 800))
def test_texts_are_as_long_as_asked_but_for_less_than_a_sentence(
    settings: dict[str, Any], count: str, more: int
) -> None:
    length = 600 + more
    text = TASK.retrieval(**settings, length=length, count=COUNTS[count]).example.text
    sentence = max(COUNTS[count](f" {s}.") for s in re.findall(r"The [^.]+(?=\.)", "".join(TEXTS)))
    assert length - sentence < COUNTS[count](text) <= length


@settings(max_examples=60, deadline=None)
@given(asked(), st.integers(900, 3000))
def test_needles_lie_as_deep_as_asked(settings: dict[str, Any], length: int) -> None:
    example, depths = TASK.retrieval(**settings, length=length, count=len)
    assert sorted(depths) == sorted(settings["depths"])
    sentences = re.findall(r"[A-Z][^.]*\.", example.text.rsplit("\n", 1)[0])
    noise = [NEEDLE.fullmatch(sentence) is None for sentence in sentences]
    for answer, depth in zip(answers_of(example), depths, strict=True):
        pattern = re.compile(rf"(Let {answer} be|The number of \w+ is {answer}\b)")
        (place,) = [i for i, sentence in enumerate(sentences) if pattern.match(sentence)]
        assert abs(sum(noise[:place]) - depth * sum(noise)) <= 0.5


def test_no_key_of_a_test_is_met_in_training() -> None:
    task = Needle(document_bytes=600)
    trained = {key or name for text in task.training(200_000, 0) for key, _, name, _ in NEEDLE.findall(text)}
    tested = {key or name for e in task.test(500, 0, 0) for key, _, name, _ in NEEDLE.findall(e.text)}
    noise = set(re.sub(r"\n.*|" + NEEDLE.pattern, "", "".join(TEXTS)).lower().replace(".", "").split())
    assert min(len(trained), len(tested), len(noise)) > 20
    assert not trained & tested
    assert not [word for word in noise if re.fullmatch(r"[bdfgklmnprstvzhj][aeiou][bdfgklmnprstvzhj][aeiou].", word)]


def test_training_documents_hold_their_answers_and_are_of_all_lengths_up_to_the_longest() -> None:
    documents = list(TASK.training(100_000, 3))
    assert documents == list(TASK.training(100_000, 3))
    for text in documents:
        prompt, rest = text.rsplit("?", 1)
        assert rest == solve(prompt + "?")[0] + "\n"
    lengths = np.array([len(text) for text in documents])
    assert lengths.max() <= TASK.document_bytes + 1
    assert np.quantile(lengths, [0.25, 0.75]).round(-2).tolist() == pytest.approx([300, 750], abs=110)
    assert abs(lengths.sum() - 100_000) < TASK.document_bytes


def test_it_is_a_task_of_a_mixture() -> None:
    portion = read_mixture({"needle": {"bytes": 5000, "kinds": ["single"], "needles": 2}})["needle"]
    examples = portion.examples(7, 0)
    assert [example.group for example in examples] == [(("kind", "single"),)] * 7
    assert len(mixed_documents({"needle": portion}, 0)) > 5


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"kinds": ("double",)}, "needle.kinds is ('double',): allowed is some of single, multi_key"),
        ({"kinds": ()}, "needle.kinds is (): allowed is some of single, multi_key"),
        ({"needles": 1}, "needle.needles is 1: allowed is 2 to 1000"),
        ({"digits": 3}, "needle.digits is 3: allowed is 4 to 18"),
        ({"document_bytes": 0}, "needle.document_bytes is 0: allowed is 1 or more"),
    ],
)
def test_a_task_that_cannot_be_is_refused(made: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Needle(**made)


def test_a_length_that_cannot_hold_the_question_is_refused_with_one_that_can() -> None:
    for kind in TASK.kinds:
        depths = [0.5] * TASK.n_answers(kind)
        with pytest.raises(
            ConfigError, match=rf"length of {kind} with 4 needles is 20: allowed is \d+ or more"
        ) as caught:
            TASK.retrieval(kind, depths, 20, len, Random(0))
        least = int(re.findall(r"(\d+) or more", str(caught.value))[0])
        assert len(TASK.retrieval(kind, depths, least, len, Random(0)).example.text) == least
    with pytest.raises(ConfigError, match=r"depths is \(0.5,\): allowed is 4 of them"):
        TASK.retrieval("multi_query", [0.5], 800, len, Random(0))
    with pytest.raises(ConfigError, match="kind is 'multi': allowed is one of single"):
        TASK.retrieval("multi", [0.5] * 4, 800, len, Random(0))


def test_documents_that_are_too_short_for_a_question_are_refused_before_any_is_written() -> None:
    with pytest.raises(ConfigError, match=r"needle.document_bytes is 200: allowed is \d+, those of") as caught:
        next(Needle(document_bytes=200).training(1000, 0))
    least = int(re.findall(r"allowed is (\d+)", str(caught.value))[0])
    assert max(len(example.text) for example in Needle(document_bytes=least).test(5, 0, 0)) == least
    with pytest.raises(ConfigError, match="or more"):
        Needle(document_bytes=least - 1).test(5, 0, 0)


class Reader:
    """Stands in for a model: at each token the likeliest next one is that of the text as `write` completes it."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], str]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.embed = SimpleNamespace(weight=torch.zeros(()))
        self.head_weight = torch.eye(tokenizer.get_vocab_size())  # hidden states are logits

    def run(self, ids: torch.Tensor, documents: torch.Tensor) -> Any:
        hidden = torch.zeros(*ids.shape, self.tokenizer.get_vocab_size())
        for row, tokens in enumerate(ids.tolist()):
            known = self.tokenizer.decode(tokens[1:]).rsplit("?", 1)[0] + "?"
            following = self.tokenizer.encode(self.write(known), add_special_tokens=False).ids
            places = range(min(len(tokens), len(following)))
            hidden[row, places, following[: len(places)]] = 1.0
        return SimpleNamespace(hidden=hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def right(prompt: str) -> str:
    return prompt + solve(prompt)[0]


def wrong(prompt: str) -> str:
    """Each answer in the place of another; where there is one alone, another number of the text or none."""
    rest, answers = solve(prompt)
    others = [*answers[1:], *answers[:1]]
    if len(answers) == 1:
        others = [n for n in re.findall(r"\d+", prompt) if n != answers[0]][:1] or ["1" * len(answers[0])]
    for number, (answer, other) in enumerate(zip(answers, others, strict=True)):
        rest = rest.replace(answer, f"<{number}>", 1)
        others[number] = other
    for number, other in enumerate(others):
        rest = rest.replace(f"<{number}>", other)
    return prompt + rest


@pytest.mark.parametrize("kind", TASK.kinds)
@pytest.mark.parametrize(("write", "accuracy"), [(right, 1.0), (wrong, 0.0)])
def test_a_model_that_reads_is_always_right_and_one_that_takes_another_value_never(
    kind: str, write: Callable[[str], str], accuracy: float
) -> None:
    tokenizer = TOKENIZERS["bpe"]
    examples = Needle(kinds=(kind,)).test(12, 0, 0)
    answers = ask(Reader(tokenizer, write), questions_of(examples, tokenizer, 1), batch_size=5)  # type: ignore[arg-type]
    assert len(answers.right) == 12 * TASK.n_answers(kind)
    assert answers.right.mean() == accuracy
