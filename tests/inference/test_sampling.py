"""Draws follow the distribution that the settings name, as transformers' own processors cut it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engram import ConfigError
from engram.inference import Sampling

V = 12


def by_transformers(sampling: Sampling, logits: Tensor, seen: Tensor) -> Tensor:
    """Probabilities after transformers' processors, in its order."""
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)])
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(seen, logits).softmax(-1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sampling=st.builds(
        Sampling,
        temperature=st.floats(0.3, 3),
        top_k=st.integers(0, V + 2),
        top_p=st.floats(0.2, 1),
        min_p=st.sampled_from([0.0, 0.05, 0.3]),
        repetition_penalty=st.sampled_from([0.7, 1.0, 1.5]),
    ),
)
def test_what_may_be_drawn_is_what_transformers_leaves(seed: int, sampling: Sampling) -> None:
    torch.manual_seed(seed)
    logits, seen = 2 * torch.randn(3, V), torch.randint(0, V, (3, 4))
    expected = by_transformers(sampling, logits.clone(), seen)
    occurred = torch.zeros(3, V, dtype=torch.bool).scatter_(1, seen, True)
    drawn = torch.stack([sampling.draw(logits, occurred) for _ in range(60)])
    for row in range(3):
        assert set(drawn[:, row].tolist()) <= set(expected[row].nonzero().flatten().tolist())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(top_k=4, temperature=2.0),
        Sampling(top_p=0.7),
        Sampling(min_p=0.1),
        Sampling(repetition_penalty=1.8, top_p=0.9, top_k=8),
    ],
    ids=str,
)
def test_draws_are_as_frequent_as_transformers_says(sampling: Sampling) -> None:
    logits, seen = 1.5 * torch.randn(1, V), torch.tensor([[1, 5]])
    probabilities = by_transformers(sampling, logits.clone(), seen)[0]
    n = 20_000
    occurred = torch.zeros(n, V, dtype=torch.bool).scatter_(1, seen.expand(n, -1), True)
    counts = sampling.draw(logits.expand(n, -1), occurred).bincount(minlength=V)
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    assert (
        chisquare(counts[possible], n * probabilities[possible].double() / probabilities.double().sum()).pvalue > 1e-4
    )


def test_the_numbers_given_decide_in_the_order_of_tokens_none_that_cannot_be_drawn() -> None:
    logits = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log()
    numbers = torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2**-53], dtype=torch.float64)
    drawn = Sampling().draw(logits.expand(6, -1), torch.zeros(6, 6, dtype=torch.bool), numbers)
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4]


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_strongest_penalties_leave_something_to_draw(penalty: float) -> None:
    logits, occurred = 100 * torch.randn(50, V), torch.rand(50, V) < 0.9
    Sampling(repetition_penalty=penalty, temperature=1e-6).draw(logits, occurred)


def test_a_temperature_of_zero_takes_the_likeliest() -> None:
    logits = torch.randn(50, V)
    nothing = torch.zeros(50, V, dtype=torch.bool)
    assert torch.equal(Sampling(temperature=0, top_k=3).draw(logits, nothing), logits.argmax(-1))


def test_no_temperature_is_too_low_and_no_logit_too_large_to_draw() -> None:
    logits, nothing = 1e38 * torch.randn(50, V).clamp(-3, 3), torch.zeros(50, V, dtype=torch.bool)
    for cut in ({}, {"top_p": 0.5, "min_p": 0.1, "top_k": 3}):
        assert torch.equal(Sampling(temperature=1e-6, **cut).draw(logits, nothing), logits.argmax(-1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", 1e-40),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", 2e6),
    ],
)
def test_a_setting_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        Sampling(**{name: value})
