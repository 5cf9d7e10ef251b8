"""Generation gives what the model gives without a cache, for prompts together as for each alone; text comes whole."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import RepetitionPenaltyLogitsProcessor

from engram import ConfigError, EngramLM, ModelConfig
from engram.inference import Sampling, generate, stream
from engram.inference.text import TextGenerator
from engram.training.tokenizer import train_bpe

TEXTS = ["Grüße aus Łódź, 東京 und 🦜🌋! " * 3, "def f(x):\n    return x + 1\n" * 4]


def model_of(vocab_size: int, **changes: Any) -> EngramLM:
    """With logits far apart, so that rounding does not choose the likeliest."""
    base: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": 24,
        "n_layers": 2,
        "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1, "head_dim": 12},
        "dense_width": 32,
        "experts": {"n_experts": 4, "top_k": 2, "width": 12},
        "memory": {"layers": [1], "rows": [31, 37], "n_heads": 2, "row_width": 4},
    }
    model = EngramLM(ModelConfig.from_dict({**base, **changes}))
    for name, parameter in model.named_parameters():
        if "conv_weight" in name or "table" in name or name == "head.weight":
            torch.nn.init.normal_(parameter)
    return model.double().eval()


@torch.no_grad()
def likeliest(model: EngramLM, prompt: list[int], n: int) -> list[int]:
    """The `n` likeliest tokens, one by one, without a cache."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 290)


def test_prompts_of_unequal_length_are_continued_as_each_alone() -> None:
    """Past where the state has to grow."""
    model = model_of(50)
    prompts: list[Any] = [[3], torch.tensor([7, 0, 0, 12, 4]), (0, 9)]
    expected = [likeliest(model, list(map(int, prompt)), 100) for prompt in prompts]
    assert generate(model, prompts, 100) == expected
    assert len({tuple(new) for new in expected}) == 3


def test_sampling_is_repeated_by_its_seed_and_differs_without() -> None:
    model = model_of(50, tied=True)
    draws = [
        generate(model, [[1, 2]], 12, sampling=Sampling(temperature=2.0), seed=seed) for seed in (3, 3, 4, None, None)
    ]
    assert draws[0] == draws[1]
    assert len({str(draw) for draw in draws}) == 4


def test_what_is_drawn_for_a_prompt_does_not_depend_on_the_others() -> None:
    model, settings = model_of(50, tied=True), {"sampling": Sampling(temperature=2.0), "seed": 3}
    prompts = [[3], [7, 0, 0, 12, 4], [0, 9]]
    alone = [generate(model, [prompt], 20, **settings)[0] for prompt in prompts]
    assert generate(model, prompts, 20, **settings) == alone
    assert generate(model, prompts[::-1], 20, **settings) == alone[::-1]
    assert len({tuple(new) for new in alone}) == 3


def test_equal_prompts_are_continued_in_ways_of_their_own() -> None:
    model, settings = model_of(50, tied=True), {"sampling": Sampling(temperature=2.0), "seed": 3}
    new = generate(model, [[1, 2]] * 6 + [[5]], 12, **settings)
    assert len({tuple(each) for each in new}) == 7
    assert new[:2] == generate(model, [[1, 2], [5], [1, 2]], 12, **settings)[::2]


def test_a_stop_token_ends_its_sequence_alone() -> None:
    model = model_of(50)
    prompts = [[3], [7, 0, 0, 12, 4]]
    free = generate(model, prompts, 20)
    stop = free[0][5]
    cut = [list(itertools.takewhile(lambda token: token != stop, new)) for new in free]
    for stop_ids in ([stop], torch.tensor([stop])):
        assert generate(model, prompts, 20, stop_ids=stop_ids) == cut
    steps = list(stream(model, prompts, 20, stop_ids=[stop]))
    assert len(steps) == max(map(len, cut))
    assert steps[-1].count(None) == sum(len(new) < len(steps) for new in cut)


@torch.no_grad()
def test_repetitions_are_penalised_in_prompt_and_continuation_but_not_by_padding() -> None:
    """As transformers' processor does it, on prompts alone; id 0 fills up the shorter one."""
    model, prompts = model_of(30), [[3], [7, 1, 12, 4, 5, 6]]
    together = generate(model, prompts, 24, sampling=Sampling(temperature=0, repetition_penalty=3.0))
    penalize = RepetitionPenaltyLogitsProcessor(3.0)
    for prompt, new in zip(prompts, together, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(24):
            likeliest = penalize(ids, model(ids)[:, -1].float()).argmax(-1, keepdim=True)
            ids = torch.cat([ids, likeliest], 1)
        assert new == ids[0, len(prompt) :].tolist()


def test_compiled_generation_is_the_same() -> None:
    model = model_of(50)
    assert generate(model, [[3, 4], [5]], 12, compiled=True) == generate(model, [[3, 4], [5]], 12)


def test_text_comes_in_whole_characters_and_adds_up(tokenizer: Tokenizer) -> None:
    """A model that only knows how to say one thing: the tokens of a text, in turn."""
    ids = tokenizer.encode(TEXTS[0]).ids
    writer = TextGenerator(model_of(290), tokenizer)
    parts = _spoken(writer, ids)
    assert "".join(parts) == tokenizer.decode(ids[1:])
    assert not any("\ufffd" in part for part in parts)
    assert parts.count("") > 0  # bytes that waited for the rest of their character


@pytest.mark.parametrize("stop", ["return", "\n    r", "x", "+ 1\n"])
def test_a_stop_text_ends_before_it_and_nothing_of_it_is_given_out(tokenizer: Tokenizer, stop: str) -> None:
    ids = tokenizer.encode(TEXTS[1]).ids
    writer = TextGenerator(model_of(290), tokenizer)
    whole = tokenizer.decode(ids[1:])
    assert "".join(_spoken(writer, ids, stop=["never there", stop])) == whole[: whole.index(stop)]


def test_of_two_stop_texts_that_come_together_the_one_that_begins_first_ends(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[1]).ids
    writer = TextGenerator(model_of(290), tokenizer)
    whole = tokenizer.decode(ids[1:])
    assert "".join(_spoken(writer, ids, stop=["turn x", "return x"])) == whole[: whole.index("return x")]


def test_generation_ends_once_every_text_has_met_a_stop_text(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    ids = tokenizer.encode(TEXTS[1]).ids
    starts, given = (1, 9), []

    def speak(*args: Any, **kwargs: Any) -> Iterator[list[int]]:
        for tokens in zip(*(ids[start:] for start in starts), strict=False):
            given.append(tokens)
            yield list(tokens)

    monkeypatch.setattr("engram.inference.text.stream", speak)
    writer = TextGenerator(model_of(290), tokenizer)
    writer.generate([tokenizer.decode(ids[:start]) for start in starts], 10**6, stop=["return"])
    needed = [next(n for n in range(99) if "return" in tokenizer.decode(ids[start : start + n])) for start in starts]
    assert needed[0] != needed[1]
    assert len(given) == max(needed)
    assert writer.n_new == sum(needed)


def test_special_tokens_are_not_printed_and_eos_ends_a_text(tokenizer: Tokenizer, monkeypatch: Any) -> None:
    writer = TextGenerator(model_of(290), tokenizer)
    pad, eos = (tokenizer.token_to_id(f"<|{name}|>") for name in ("pad", "eos"))
    ids = tokenizer.encode("def f(x)").ids
    assert "".join(_spoken(writer, [*ids[:2], pad, *ids[2:]])) == tokenizer.decode(ids[1:])
    asked: dict[str, Any] = {}
    monkeypatch.setattr("engram.inference.text.stream", lambda *args, **settings: iter(asked.update(settings) or []))
    writer.generate(["def f(x)"], 40)
    assert asked["stop_ids"] == {eos}


def _spoken(writer: TextGenerator, ids: list[int], **settings: Any) -> list[str]:
    """What `writer` makes of a generation that gives `ids` after the first one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engram.inference.text.stream", lambda *args, **kwargs: ([i] for i in ids[1:]))
        return [part for (part,) in writer.stream([writer.tokenizer.decode(ids[:1])], len(ids), **settings)]


def test_several_texts_are_continued_together(tokenizer: Tokenizer) -> None:
    writer = TextGenerator(model_of(290), tokenizer)
    prompts = ["def f", "Grüße aus der", "x"]
    alone = [writer.generate([prompt], 12)[0] for prompt in prompts]
    assert writer.generate(prompts, 12) == alone


def test_what_cannot_be_continued_is_refused(tokenizer: Tokenizer) -> None:
    model, diverged = model_of(290), model_of(290)
    torch.nn.init.constant_(diverged.norm.weight, float("nan"))
    refused: list[tuple[str, Any]] = [
        ("prompts is 0", lambda: generate(model, [], 3)),
        ("length of a prompt in tokens is 0", lambda: generate(model, [[1], []], 3)),
        ("max_new_tokens is 0", lambda: generate(model, [[1]], 0)),
        ("seed is 18446744073709551616", lambda: generate(model, [[1]], 3, seed=2**64)),
        ("token's logit is \\[nan\\]", lambda: generate(diverged, [[1]], 3)),
        ("prompt is 'a\\\\udcff'", lambda: TextGenerator(model, tokenizer).generate(["a\udcff"], 3)),
        ("token id is 290", lambda: generate(model, [[290]], 3)),
        ("token id is -1", lambda: generate(model, [[4], [5, -1]], 3)),
        (f"token id is {2**70}", lambda: generate(model, [[2**70]], 3)),
        ("prompt is 'a': allowed is token ids", lambda: generate(model, ["a"], 3)),
        ("prompts is 'def f': allowed is a list", lambda: TextGenerator(model, tokenizer).generate("def f", 3)),
        ("stop is 'ab': allowed is a list", lambda: TextGenerator(model, tokenizer).generate(["a"], 3, stop="ab")),
        ("length of a prompt in tokens is 0", lambda: TextGenerator(model, tokenizer).generate([""], 3)),
        ("stop is \\[''\\]", lambda: TextGenerator(model, tokenizer).generate(["a"], 3, stop=[""])),
        ("ids of the tokenizer is", lambda: TextGenerator(model_of(50), tokenizer)),
    ]
    for message, call in refused:
        with pytest.raises(ConfigError, match=message):
            call()
