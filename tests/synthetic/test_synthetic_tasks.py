"""Synthetic tasks: their answers are right and in no training document, and a guesser gets the chance they name."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from random import Random

import numpy as np
import pytest

from engram.config import ConfigError
from engram.synthetic.arithmetic import Arithmetic
from engram.synthetic.brackets import Brackets
from engram.synthetic.examples import Example
from engram.synthetic.facts import VALUES, Facts
from engram.synthetic.induction import Induction
from engram.synthetic.mixture import TASKS, mixed_documents, read_mixture
from engram.synthetic.recall import Recall
from engram.synthetic.words import n_words, nonce_word, nonce_words

NAMES = ("facts", "induction", "recall", "arithmetic", "brackets")
BYTES = 40_000


def answers(example: Example) -> list[str]:
    return [example.text[start:end] for start, end in example.answers]


def test_every_number_has_a_nonce_word_of_its_own() -> None:
    words = [nonce_word(i, syllables=1) for i in range(n_words(1))]
    assert len(set(words)) == len(words) == 16 * 5 * 8
    assert all(re.fullmatch("([a-z][aeiou])[a-z]", word) for word in words)


def test_parts_of_the_nonce_words_share_none_and_look_alike() -> None:
    parts = [nonce_words(5000, Random(0), part=part, parts=2) for part in (0, 1)]
    assert len({*parts[0], *parts[1]}) == 10_000
    for place in range(5):  # no letter tells which part a word is of
        counts = [np.bincount([ord(word[place]) for word in part], minlength=128) for part in parts]
        assert np.abs(counts[0] - counts[1]).max() < 5 * np.sqrt(2 * max(counts[0].max(), 1))


@pytest.mark.parametrize("name", NAMES)
def test_documents_follow_from_their_arguments_and_are_as_many_bytes_as_asked(name: str) -> None:
    task = TASKS[name]()
    documents = list(task.training(BYTES, 3))
    assert documents == list(task.training(BYTES, 3))
    assert documents != list(task.training(BYTES, 4))
    assert len("".join(documents)) == pytest.approx(BYTES, rel=0.15)
    assert np.mean([len(text) for text in documents]) < 400
    assert all(text.endswith("\n") for text in documents)
    assert task.test(20, BYTES, 3) == task.test(20, BYTES, 3)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_words_in_order_and_the_last_one_ends_the_text(name: str) -> None:
    examples = TASKS[name]().test(100, BYTES, 0)
    assert len(examples) >= (40 if name == "facts" else 100)
    for example in examples:
        assert 0 < example.chance < 1
        assert example.answers[-1][1] == len(example.text)
        assert list(example.answers) == sorted(example.answers)
        for start, end in example.answers:
            assert example.text[start - 1] == " "
            assert not re.search(r"\s", example.text[start:end])
            assert example.text[end : end + 1] in ("", " ")


def test_a_copy_is_told_by_the_word_before_and_nonce_words_of_tests_are_in_no_training_document() -> None:
    task = Induction()
    trained = {word for text in task.training(BYTES, 0) for word in text.split()}
    groups = set()
    for example in task.test(60, BYTES, 0):
        words = example.text.split()
        stretch = words[-task.longest :]
        first = words.index(stretch[0])
        assert words[first : first + task.longest] == stretch
        assert answers(example) == stretch[1:]
        assert len(set(words)) == len(words) - task.longest == round(1 / example.chance)
        assert example.group[0] == ("gap", len(words) - 2 * task.longest - first)
        assert trained.isdisjoint(words) == (example.group[1] == ("words", "nonce"))
        groups.add(example.group)
    assert len(groups) == 6


def test_over_a_third_of_the_word_pairs_of_induction_documents_are_repeats() -> None:
    told = []
    for text in Induction().training(BYTES, 0):
        pairs = list(pairwise(text.split()))
        told.append(sum(pair in pairs[:i] for i, pair in enumerate(pairs)) / len(pairs))
    assert np.mean(told) > 0.35


def test_a_query_has_the_value_that_its_key_was_given_and_documents_share_no_table() -> None:
    tables = set()
    for example in Recall().test(90, BYTES, 0):
        given, asked = example.text.removeprefix("given: ").split("; asked: ")
        pairs = [tuple(pair.split()) for pair in given.split(", ")]
        table = dict(pairs)
        queries = [tuple(query.split()) for query in asked.split(", ")]
        assert len(table) == len(set(table.values())) == dict(example.group)["pairs"]
        assert set(queries) <= table.items()
        assert answers(example) == [table[queries[-1][0]]]
        distance = len(pairs) - 1 - pairs.index(queries[-1]) + len(queries) - 1
        bound = int(dict(example.group)["distance_below"])
        assert (0 if bound == 2 else bound // 2) <= distance < bound
        tables.add(frozenset(pairs))
    trained = {text.split(";")[0] for text in Recall().training(BYTES, 0)}
    assert len(tables) > 80
    big = {example.text.split(";")[0] for example in Recall().test(90, BYTES, 0) if ("pairs", 8) in example.group}
    assert not trained & big


def test_sums_are_right_and_held_out_pairs_are_trained_on_in_neither_order() -> None:
    task = Arithmetic()
    lines = [line for text in task.training(BYTES, 0) for line in text.splitlines()]
    examples = task.test(200, BYTES, 0)
    asked = [example.text.splitlines()[-1] for example in examples]
    pairs = []
    for line in lines + asked:
        found = re.fullmatch("so (.) [+] (.) = (.)", line)
        assert found
        a, b, c = (ord(letter) - ord("a") for letter in found.groups())
        assert 0 <= c == (a + b) % task.modulus
        pairs.append(frozenset((a, b)))
    trained = set(pairs[: len(lines)])
    for example, pair in zip(examples, pairs[len(lines) :], strict=True):
        assert (pair in trained) == (example.group == (("pair", "seen"),))
        assert not any(line.split("= ")[1] == answers(example)[0] for line in example.text.splitlines()[:-1])
        assert all(line in lines for line in example.text.splitlines()[:-1])
    assert len(trained) == 276 - 55  # a fifth of the unordered pairs of 23 numbers is held out


def test_closers_match_their_openers_and_no_test_line_is_trained_on() -> None:
    task, partner = Brackets(), dict(zip("([{<", ")]}>", strict=True))
    trained = {line.split(" : ")[0] for text in task.training(BYTES, 0) for line in text.splitlines()}
    for example in task.test(100, BYTES, 0):
        question, closers = example.text.split(" : ")
        stack: list[str] = []
        for bracket in example.text.replace(":", "").split():
            if bracket in partner:
                stack.append(partner[bracket])
            else:
                assert stack.pop() == bracket
        assert not stack
        assert answers(example) == closers.split()
        assert example.group == (("depth", len(closers.split())),)
        assert question not in trained
        assert len(question.split()) <= task.length


def guess_fact(example: Example, random: Random) -> str:
    relation = next(relation for relation in VALUES if relation in example.text)
    return random.choice(VALUES[relation].split())


GUESSERS: dict[str, Callable[[Example, Random], str]] = {
    "facts": guess_fact,
    "induction": lambda example, random: random.choice(sorted(set(example.text.split()))),
    "recall": lambda example, random: random.choice(re.split("[:;,] ?", example.text)[1:-1]).split()[-1],
    "arithmetic": lambda example, random: random.choice("abcdefghijklmnopqrstuvw"),
    "brackets": lambda example, random: random.choice(")]}>"),
}


@pytest.mark.parametrize("name", NAMES)
def test_somebody_who_guesses_gets_the_chance_that_examples_name(name: str) -> None:
    random, right, chances = Random(0), [], []
    for example in TASKS[name]().test(400, 10 * BYTES, 0):
        text = example.text
        if name == "recall":  # the pairs alone
            example = example._replace(text=text.split("; asked")[0] + ", ")
        right += [GUESSERS[name](example, random) == answer for answer in answers(example._replace(text=text))]
        chances += [example.chance] * len(example.answers)
    mean = np.mean(chances)
    assert len(right) >= 300
    assert np.mean(right) == pytest.approx(mean, abs=4 * np.sqrt(mean * (1 - mean) / len(right)))


def test_a_mixture_has_the_documents_of_its_tasks_in_random_order() -> None:
    settings = {"recall": {"bytes": 5000, "pairs": [3]}, "brackets": 5000, "facts": 0}
    portions = read_mixture(settings)
    documents = mixed_documents(portions, 1)
    assert portions.keys() == {"recall", "brackets"}
    for name, portion in portions.items():
        texts = [text for task, text in documents if task == name]
        assert texts != list(portion.task.training(5000, 1))
        assert sorted(texts) == sorted(portion.task.training(5000, 1))
    assert all(text.split(";")[0].count(",") == 2 for task, text in documents if task == "recall")
    assert documents != mixed_documents(portions, 2)
    assert documents == mixed_documents(read_mixture(dict(reversed(settings.items()))), 1)
    turns = [one[0] != two[0] for one, two in pairwise(documents)]
    assert 0.3 < np.mean(turns) < 0.7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fact": 100}, "unknown task mixture.fact is 100: allowed is one of facts, induction"),
        ({"facts": -1}, "mixture.facts is -1: allowed is a number of bytes"),
        ({"facts": "1e5"}, "mixture.facts is '1e5': allowed is a number of bytes"),
        ({"facts": True}, "mixture.facts is True"),
        ({"facts": {"exposures": [1]}}, r"mixture.facts is {'exposures': \[1\]}: allowed is a number of bytes, or a"),
        ({"facts": {"bytes": 100, "exposure": [1]}}, "unknown setting mixture.facts.exposure"),
        ({"facts": {"bytes": 1.5}}, "mixture.facts.bytes is 1.5: allowed is a number of bytes"),
        ({"facts": {"bytes": 100, "exposures": [2, 2]}}, r"mixture.facts.exposures is \(2, 2\)"),
        (
            {"facts": {"bytes": 10, "exposures": [0]}},
            r"mixture.facts.exposures is \(0,\): allowed is different",
        ),
        (
            {"facts": {"bytes": 1, "exposures": [*range(1, 1500)]}},
            r"mixture.facts.exposures is .* allowed is no more",
        ),
        ({"facts": {"bytes": 100, "document_bytes": 0}}, "mixture.facts.document_bytes is 0"),
        ({"recall": {"bytes": 100, "pairs": [1]}}, r"mixture.recall.pairs is \(1,\)"),
        ({"induction": {"bytes": 100, "longest": 2}}, "mixture.induction.longest is 2: allowed is 3"),
        ({"recall": {"bytes": 100, "rounds": 0}}, "mixture.recall.rounds is 0"),
        ({"induction": {"bytes": 100, "n_words": 7}}, "mixture.induction.n_words is 7: allowed is 24, "),
        ({"arithmetic": {"bytes": 100, "modulus": 27}}, "mixture.arithmetic.modulus is 27: allowed is 3 to 26"),
        ({"arithmetic": {"bytes": 100, "held_out": 1.0}}, "mixture.arithmetic.held_out is 1.0"),
        ({"brackets": {"bytes": 100, "length": 7}}, "mixture.brackets.length is 7: allowed is 14"),
        ({"needle": {"bytes": 100, "document_bytes": 200}}, r"mixture.needle.document_bytes is 200: allowed is \d+"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_by_the_whole_name_of_the_setting(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_mixture(settings)
    with pytest.raises(ConfigError, match=message.replace("mixture", "data.mixture", 1)):
        read_mixture(settings, "data.mixture")


@pytest.mark.parametrize("exposures", [(1, 4, 16, 64), (1, 2), (5,)])
def test_bytes_that_no_facts_can_fill_are_refused_with_those_that_some_can(exposures: tuple[int, ...]) -> None:
    for impossible in (1, 10**13):
        with pytest.raises(ConfigError, match=rf"^data.mixture.facts.bytes is {impossible}: allowed is") as caught:
            read_mixture({"facts": {"bytes": impossible, "exposures": exposures}}, "data.mixture")
        ends = re.search("allowed is ([0-9,]+) to ([0-9,]+)", str(caught.value))
        assert ends
        least, most = (int(end.replace(",", "")) for end in ends.groups())
        task = read_mixture({"facts": {"bytes": least, "exposures": exposures}})["facts"].task
        assert isinstance(task, Facts)
        for n_bytes in (least, most):  # names for all of them are drawn
            kinds = Counter((fact.place, fact.names, fact.exposures) for fact in task.facts(n_bytes, 0))
            assert len(kinds) == 2 * 2 * (1 + len(exposures))
            assert len(set(kinds.values())) == 1
        for n_bytes in (least - 1, most + 2):
            with pytest.raises(ConfigError, match=rf"facts.bytes is {n_bytes}"):
                task.facts(n_bytes, 0)


@pytest.mark.parametrize("modulus", [3, 4, 5, 10])
def test_whatever_is_held_out_leaves_sums_to_write_before_each_question(modulus: int) -> None:
    with pytest.raises(ConfigError, match=r"arithmetic.held_out is 0.95: allowed is between 0 and") as caught:
        Arithmetic(modulus=modulus, held_out=0.95)
    most = float(re.findall("and ([0-9.]+),", str(caught.value))[0])
    for seed in range(40):
        assert len(Arithmetic(modulus=modulus, held_out=most).test(60, 1, seed)) == 60
