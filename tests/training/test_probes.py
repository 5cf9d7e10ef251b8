"""Questions asked of a model: an answer is right if greedy decoding writes it, whatever else is in the batch."""

import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from small_run import MODEL, Run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from engram.backbone import EngramLM
from engram.config import ConfigError, ModelConfig
from engram.inference import generate
from engram.inference.opening import open_model
from engram.synthetic.examples import Example
from engram.synthetic.mixture import TASKS
from engram.training.probes import answers_by_group, ask, questions_of, score
from engram.training.tokenizer import train_bpe

Train = Callable[..., Run]
WORDS = [f"w{i}" for i in range(40)]
EOS = 40
MIXTURE = {"facts": 20_000, "recall": 4_000, "brackets": 4_000}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token a word."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<|eos|>"])}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.fixture(scope="module")
def model() -> EngramLM:
    torch.manual_seed(1)
    config = ModelConfig.from_dict(MODEL | {"vocab_size": 41, "memory": {**MODEL["memory"], "eos_id": EOS}})  # type: ignore[dict-item]
    model = EngramLM(config).eval()
    torch.nn.init.normal_(model.head_weight, std=0.3)
    for memory in model.memories().values():  # which add something, so that it matters what they read
        for parameter in memory.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def examples(model: EngramLM) -> list[Example]:
    """Texts with one or two answers of one to three words, some just as greedy decoding would write them."""
    random, examples = Random(0), []
    for i in range(30):
        ids, spans, answers = [random.randrange(40) for _ in range(random.randint(1, 14))], [], []
        for _ in range(random.randint(1, 2)):
            written = generate(model, [ids], random.randint(1, 3))[0]
            if EOS in written or random.random() < 0.4:
                written[-1] = (written[-1] + 1) % 40
            spans.append((len(ids), len(ids) + len(written)))
            ids += [*written, random.randrange(40)]
        ends = np.cumsum([0, *(len(WORDS[t]) + 1 for t in ids)])
        answers = tuple((int(ends[a]), int(ends[b]) - 1) for a, b in spans)
        text = " ".join(WORDS[t] for t in ids)
        examples.append(Example(text, answers, (("size", len(ids) // 8), ("kind", "ab"[i % 2])), 0.1 * (1 + i % 2)))
    return examples


def words_of(example: Example) -> list[tuple[list[int], list[int]]]:
    """Of each answer the ids before it and its own."""
    split = [(example.text[:a].split(), example.text[a:b].split()) for a, b in example.answers]
    return [([WORDS.index(w) for w in before], [WORDS.index(w) for w in own]) for before, own in split]


def test_an_answer_is_right_if_greedy_decoding_writes_it(
    model: EngramLM, tokenizer: Tokenizer, examples: list[Example]
) -> None:
    expected = [
        generate(model, [before], len(own))[0] == own for example in examples for before, own in words_of(example)
    ]
    answers = ask(model, questions_of(examples, tokenizer, EOS))
    assert answers.right.tolist() == expected
    assert 8 < sum(expected) < len(expected) - 8
    assert answers.question.tolist() == [i for i, example in enumerate(examples) for _ in example.answers]


def test_nats_are_those_of_each_text_alone(model: EngramLM, tokenizer: Tokenizer, examples: list[Example]) -> None:
    found = ask(model, questions_of(examples, tokenizer, EOS)).nats
    expected = []
    for example in examples:
        for before, own in words_of(example):
            ids = torch.tensor([[EOS, *before, *own]])
            with torch.no_grad():
                log_probs = model(ids, torch.tensor([[0] + [1] * (ids.shape[1] - 1)])).double().log_softmax(-1)
            expected.append(-sum(log_probs[0, len(before) + i, token].item() for i, token in enumerate(own)))
    assert found.dtype == np.float64
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 30])
def test_results_do_not_depend_on_the_batch_size(
    model: EngramLM, tokenizer: Tokenizer, examples: list[Example], batch_size: int
) -> None:
    questions = questions_of(examples, tokenizer, EOS)
    one, other = ask(model, questions, 4), ask(model, questions, batch_size)
    assert (one.right == other.right).all()
    np.testing.assert_allclose(one.nats, other.nats, rtol=1e-5)
    assert one.nats.std() > 1


def test_scores_are_means_over_answers_by_value_of_each_group(
    model: EngramLM, tokenizer: Tokenizer, examples: list[Example]
) -> None:
    answers = ask(model, questions_of(examples, tokenizer, EOS))
    found = {value: score(examples, answers, who) for value, who in answers_by_group(examples, answers).items()}
    assert found.keys() == {value for example in examples for value in example.group}
    for kind, rest in (("a", 0), ("b", 1)):
        own = [i for i, question in enumerate(answers.question) if question % 2 == rest]
        right, nats = (np.mean([values[i] for i in own]) for values in (answers.right, answers.nats))
        assert found["kind", kind] == pytest.approx((len(own), right, nats, 0.1 * (1 + rest)))
    whole = score(examples, answers)
    assert whole.n == len(answers.right) == sum(found["kind", kind].n for kind in "ab")
    assert whole.accuracy == answers.right.mean()
    assert math.isnan(score(examples, answers, np.zeros(whole.n, bool)).accuracy)


@pytest.mark.parametrize("vocab_size", [258, 600])
@pytest.mark.parametrize("name", ["facts", "induction", "recall", "arithmetic", "brackets"])
def test_the_tokens_of_an_answer_spell_it(name: str, vocab_size: int) -> None:
    task = TASKS[name]()
    tokenizer = train_bpe(task.training(20_000, 0), vocab_size)
    examples = task.test(20, 20_000, 0)
    for example, question in zip(examples, questions_of(examples, tokenizer, 1), strict=True):
        assert question.ids[0] == 1
        assert tokenizer.decode(question.ids) == example.text
        spelt = [tokenizer.decode(question.ids[first:end]).strip() for first, end in question.answers]
        assert spelt == [example.text[a:b] for a, b in example.answers]


def test_an_answer_inside_a_token_is_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"colour=red": 0, "is": 1}, "is"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    with pytest.raises(ConfigError, match="answer 'red': the tokenizer joins it with other text: 'colour=red'"):
        questions_of([Example("is colour=red", ((10, 13),))], tokenizer, 1)


def test_a_run_on_a_mixture_is_asked_at_each_validation(train: Train) -> None:
    run = train(data__config__mixture=MIXTURE, data__config__probe_examples=30, trainer__precision="32-true")
    assert run.code == 0
    kinds = {f"{what}{name}" for name in MIXTURE for what in ("probe_", "probe_nats_")}
    assert all(kinds <= entry.keys() for entry in run.result["history"])
    assert [entry["step"] for entry in run.result["history"]] == [4, 8]
    assert list(run.column("val/probe_nats_recall")) == [3, 7]
    # The trained model, opened from its folder, answers the same.
    model, tokenizer = open_model(run.folder / "model")
    assert tokenizer is not None
    for name, n_bytes in MIXTURE.items():
        examples = [e for e in TASKS[name]().test(30, n_bytes, 0) if not e.control]
        found = score(examples, ask(model, questions_of(examples, tokenizer, 1), 3))
        assert run.result["val"][f"probe_{name}"] == pytest.approx(found.accuracy)
        assert run.result["val"][f"probe_nats_{name}"] == pytest.approx(found.nats, rel=1e-5)
    splits = run.result["data"]["splits"]
    assert all(splits["train"][name]["bytes"] > 0 == splits["validation"][name]["bytes"] for name in MIXTURE)


def test_a_resumed_run_is_asked_the_same(train: Train, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"data__config__mixture": MIXTURE, "data__config__probe_examples": 10}
    whole = train("whole", **settings)
    rest = train("rest", resume=whole.folder / "step-4", **settings)
    assert rest.result["history"] == whole.result["history"]


def test_settings_of_a_mixture_that_cannot_be_end_in_one_line(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    for changes, message in (
        ({"mixture": {"fact": 1}}, "unknown task data.mixture.fact is 1: allowed is one of facts, "),
        ({"mixture": {"facts": -5}}, "data.mixture.facts is -5: allowed is a number of bytes"),
        ({"mixture_seed": -1}, "data.mixture_seed is -1: allowed is 0 or more"),
        ({"probe_examples": 0}, "data.probe_examples is 0: allowed is 1 or more"),
    ):
        run = train(**{f"data__config__{name}": value for name, value in changes.items()})
        assert run.code == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {message}")
