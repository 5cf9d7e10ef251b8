"""Generation, token by token, with what was computed before kept (`EngramLM.step`).

Prompts of unequal length are generated from together; each gets what it would get alone, also where tokens are drawn:
by numbers of its own, which follow from the seed and the prompt.
"""

from __future__ import annotations

import operator
import random
import secrets
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from engram.backbone import DecodingState, EngramLM
from engram.config import require
from engram.inference.sampling import Sampling

_ROOM = 64  # tokens for which the state has room at first


def stream(
    model: EngramLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    compiled: bool = False,
) -> Iterator[list[int | None]]:
    """After each step the new token of every prompt, None for those that have ended.

    Args:
        model: in evaluation mode, on any device.
        prompts: token ids, of any lengths from 1; lists, or tensors.
        max_new_tokens: after which all end.
        sampling: how tokens are drawn; the most likely ones if None.
        stop_ids: tokens that end a sequence; they are not given out.
        seed: of the draws; a fresh one if None. A prompt's do not depend on the others; of equal prompts each has its
            own.
        compiled: compile the step, which takes minutes and is worth it for long texts.

    Raises:
        ConfigError: no prompts, a text in the place of token ids, or an empty prompt; a token id outside the
            vocabulary, `max_new_tokens` below 1, a seed of more than 64 bits; when a step gives no finite logit.
    """
    require(len(prompts) > 0, "prompts", len(prompts), "1 or more")
    for prompt in (prompts, *prompts):
        require(not isinstance(prompt, str), "prompt", prompt, "token ids; `TextGenerator` continues texts")
    ids = [list(map(operator.index, prompt)) for prompt in prompts]
    shortest, longest = min(map(len, ids)), max(map(len, ids))
    require(shortest > 0, "length of a prompt in tokens", shortest, "1 or more")
    for worst in (min(map(min, ids)), max(map(max, ids))):
        n = model.config.vocab_size
        require(0 <= worst < n, "token id", worst, f"0 to {n - 1}")
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "1 or more")
    require(seed is None or -(2**63) <= seed < 2**64, "seed", seed, "-2**63 to 2**64 - 1")
    return _stream(
        model, ids, longest, max_new_tokens, sampling, frozenset(map(operator.index, stop_ids)), seed, compiled
    )


@torch.no_grad()
def _stream(
    model: EngramLM,
    prompts: list[list[int]],
    longest: int,
    max_new_tokens: int,
    sampling: Sampling | None,
    stop_ids: frozenset[int],
    seed: int | None,
    compiled: bool,
) -> Iterator[list[int | None]]:
    device, sampling = model.embed.weight.device, sampling or Sampling(temperature=0)
    draws = _draws(prompts, secrets.randbits(64) if seed is None else operator.index(seed))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.arange(longest, device=device) >= torch.tensor([[longest - len(p)] for p in prompts], device=device)

    room = max_new_tokens if compiled else min(max_new_tokens, _ROOM)
    state = model.init_state(len(prompts), longest + room)
    logits = model.logits(model.step(ids, state, None if bool(mask.all()) else mask).hidden[:, -1])
    occurred = torch.zeros(logits.shape, dtype=torch.bool, device=device)
    for row, prompt in zip(occurred, prompts, strict=True):
        row[prompt] = True

    step = torch.compile(_next_logits, dynamic=False) if compiled else _next_logits
    running = [True] * len(prompts)
    for n in range(1, max_new_tokens + 1):
        likeliest = logits.amax(-1)
        require(bool(likeliest.isfinite().all()), "the likeliest token's logit", likeliest.tolist(), "finite")
        numbers = None
        if sampling.temperature > 0:
            numbers = torch.tensor([own.random() for own in draws], dtype=torch.float64, device=device)
        new = sampling.draw(logits, occurred, numbers)
        tokens = new.tolist()
        running = [runs and token not in stop_ids for runs, token in zip(running, tokens, strict=True)]
        if not any(running):
            return
        yield [token if runs else None for runs, token in zip(running, tokens, strict=True)]
        if n == max_new_tokens:
            return
        if longest + n > state.capacity:
            state.grow(longest + min(max_new_tokens, n + n // 2))
        occurred.scatter_(1, new.unsqueeze(1), True)
        logits = step(model, new.unsqueeze(1), state)


def _draws(prompts: list[list[int]], seed: int) -> list[random.Random]:
    """What draws for each prompt: it depends on nothing else but how many equal ones are before it."""
    return [random.Random(str((seed, prompts[:i].count(prompt), prompt))) for i, prompt in enumerate(prompts)]


def _next_logits(model: EngramLM, ids: Tensor, state: DecodingState) -> Tensor:
    return model.logits(model.step(ids, state).hidden[:, -1])


def generate(
    model: EngramLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    seed: int | None = None,
    compiled: bool = False,
) -> list[list[int]]:
    """The new tokens of every prompt; arguments and errors as `stream`."""
    new: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        model, prompts, max_new_tokens, sampling=sampling, stop_ids=stop_ids, seed=seed, compiled=compiled
    ):
        for row, token in zip(new, tokens, strict=True):
            if token is not None:
                row.append(token)
    return new
