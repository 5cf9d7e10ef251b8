"""Decoding in any chunks, with padding, going back and beams, gives what the whole sequence gives without a cache."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import GQA, MLA, SHAPES, V, model_of
from torch import Tensor

from engram import ConfigError, EngramLM
from engram.backbone import DecodingState

T = 17
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}
ANGLES = {"rtol": 1e-5, "atol": 1e-6}  # those of other positions, equally far apart, are float32


def exact(shape: str) -> EngramLM:
    """In float64, in which agreement means the same arithmetic."""
    return model_of(**SHAPES[shape]).double().eval()


def step(model: EngramLM, ids: Tensor, state: DecodingState, mask: Tensor | None = None) -> Tensor:
    return model.logits(model.step(ids, state, mask).hidden)


@torch.no_grad()
def uncached(model: EngramLM, ids: Tensor) -> Tensor:
    return model(ids)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunks", [[1] * T, [5, 1, 1, 7, 3], [T]], ids=str)
def test_decoding_in_any_chunks_equals_the_whole(shape: str, chunks: list[int]) -> None:
    model, ids = exact(shape), torch.randint(0, V, (2, T))
    state = model.init_state(2, capacity=T + 3)
    logits = torch.cat([step(model, part, state) for part in ids.split(chunks, 1)], 1)
    torch.testing.assert_close(logits, uncached(model, ids), **ROUNDING)
    assert logits.std(1).min() > 1e-3  # positions differ


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunks", [[9, 1, 1], [3, 8], [1] * 11], ids=str)
def test_padding_before_a_prompt_changes_nothing(shape: str, chunks: list[int]) -> None:
    model, ids = exact(shape), torch.randint(0, V, (3, 11))
    begins = [0, 4, 7]
    mask = torch.arange(11) >= torch.tensor(begins).unsqueeze(1)
    state = model.init_state(3, capacity=11)
    parts = zip(ids.split(chunks, 1), mask.split(chunks, 1), strict=True)
    logits = torch.cat([step(model, part, state, real) for part, real in parts], 1)
    assert logits.isfinite().all()  # padding's too: nothing of it may reach others as NaN times zero
    for row, begin in enumerate(begins):
        alone = uncached(model, ids[row : row + 1, begin:])
        torch.testing.assert_close(logits[row : row + 1, begin:], alone, **ANGLES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("attention", [GQA, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("chunks", [[9, 1, 1], [3, 8], [11]], ids=str)
def test_the_gpu_decodes_padded_prompts_as_the_cpu_does(attention: dict[str, Any], chunks: list[int]) -> None:
    model = model_of(attention=attention, experts=None, n_dense_layers=3).eval()
    ids, mask = torch.randint(0, V, (3, 11)), torch.arange(11) >= torch.tensor([[0], [4], [7]])

    def decoded(device: str) -> Tensor:
        there = deepcopy(model).to(device)
        state = there.init_state(3, capacity=13)
        parts = zip(ids.to(device).split(chunks, 1), mask.to(device).split(chunks, 1), strict=True)
        return torch.cat([step(there, part, state, real) for part, real in parts], 1)[mask.to(device)].cpu()

    torch.testing.assert_close(decoded("cuda"), decoded("cpu"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_tokens_taken_back_leave_no_trace(shape: str, data: st.DataObject) -> None:
    """Each sequence loses its own number of tokens, several times, and goes on with others."""
    model, slack = exact(shape), 5
    begins = [0, 2]
    mask = torch.arange(4) >= torch.tensor(begins).unsqueeze(1)
    ids = torch.randint(0, V, (2, 4))
    seen: list[list[int]] = [row[begin:].tolist() for row, begin in zip(ids, begins, strict=True)]
    state = model.init_state(2, capacity=60, slack=slack)
    step(model, ids, state, mask)
    for _ in range(3):
        new = torch.randint(0, V, (2, data.draw(st.integers(1, 6))))
        logits = step(model, new, state)
        for row, before in enumerate(seen):
            before += new[row].tolist()
            expected = uncached(model, torch.tensor([before]))[:, -new.shape[1] :]
            torch.testing.assert_close(logits[row : row + 1], expected, **ANGLES)
        most = min(slack, new.shape[1])
        lost = [data.draw(st.integers(0, most)) for _ in range(2)]
        state.rollback(torch.tensor(lost) if lost[0] != lost[1] else lost[0])
        seen = [before[: len(before) - n] for before, n in zip(seen, lost, strict=True)]


@pytest.mark.parametrize("shape", ["plain", "latent", "bigram", "over encoding", "branches"])
def test_a_state_that_is_reset_is_as_new(shape: str) -> None:
    model = exact(shape)
    state = model.init_state(2, capacity=9, slack=3)
    for _ in range(2):
        ids = torch.randint(0, V, (2, 9))
        logits = torch.cat([step(model, part, state) for part in ids.split([6, 1, 2], 1)], 1)
        torch.testing.assert_close(logits, uncached(model, ids), **ROUNDING)
        state.reset()
    with pytest.raises(ConfigError, match="tokens to take back is 1: allowed is 0 to 0"):
        state.rollback(1)


@pytest.mark.parametrize("shape", ["plain", "latent", "bigram", "over encoding", "branches"])
def test_sequences_are_chosen_and_doubled_as_beams_are(shape: str) -> None:
    model, ids = exact(shape), torch.randint(0, V, (3, 6))
    state = model.init_state(3, capacity=6)
    step(model, ids, state)
    rows = torch.tensor([2, 0, 2, 2])
    state.select(rows)
    state.grow(9)
    more = torch.randint(0, V, (4, 3))
    expected = uncached(model, torch.cat([ids[rows], more], 1))[:, 6:]
    torch.testing.assert_close(step(model, more, state), expected, **ROUNDING)


def test_room_of_tokens_taken_back_is_there_again() -> None:
    model, ids = exact("plain"), torch.randint(0, V, (2, 8))
    state = model.init_state(2, capacity=6, slack=4)
    step(model, ids[:, :6], state)
    state.rollback(torch.tensor([2, 0]))
    state.rollback(torch.tensor([0, 2]))
    whole = torch.cat([ids[:, :4], ids[:, 6:]], 1)
    torch.testing.assert_close(step(model, ids[:, 6:], state), uncached(model, whole)[:, 4:], **ROUNDING)


def test_a_copied_state_goes_its_own_way_and_does_not_copy_the_tables() -> None:
    model, ids = exact("two memories"), torch.randint(0, V, (2, 9))
    state = model.init_state(2, capacity=9, slack=2)
    step(model, ids[:, :6], state)
    twin = deepcopy(state)
    step(model, ids[:, 6:], state)
    twin.rollback(1)
    other = torch.cat([ids[:, :5], ids[:, :3]], 1)
    torch.testing.assert_close(step(model, ids[:, :3], twin), uncached(model, other)[:, 5:], **ROUNDING)
    kept = {id(x) for x in vars(twin)["_memories"].values()}
    assert kept == {id(memory) for memory in model.memories().values()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_decodes_as_it_computes(shape: str, dtype: torch.dtype) -> None:
    model, ids = model_of(**SHAPES[shape]).to(dtype).eval(), torch.randint(0, V, (2, T))
    state = model.init_state(2, capacity=T)
    logits = torch.cat([step(model, part, state) for part in ids.split([6] + [1] * 11, 1)], 1)
    whole = uncached(model, ids)
    assert logits.dtype == dtype
    assert (logits - whole).abs().max() < 0.1 * whole.abs().max()


@pytest.mark.parametrize("shape", ["plain", "latent", "further", "further, latent", "two memories"])
def test_one_compiled_step_serves_every_token(shape: str) -> None:
    model, ids = exact(shape), torch.randint(0, V, (2, 12))
    state = model.init_state(2, capacity=16)
    step(model, ids[:, :5], state)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda new: step(model, new, state), backend=counter, fullgraph=True, dynamic=False)
    logits = torch.cat([compiled(ids[:, at : at + 1]) for at in range(5, 12)], 1)
    torch.testing.assert_close(logits, uncached(model, ids)[:, 5:], **ROUNDING)
    assert counter.frame_count == 1


def test_float32_decoding_agrees_to_rounding_under_autocast_too() -> None:
    for attention in ({}, {"attention": MLA}):
        model, ids = model_of(**attention).eval(), torch.randint(0, V, (2, T))
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                state = model.init_state(2, capacity=T)
                logits = torch.cat([step(model, part, state) for part in ids.split([6] + [1] * 11, 1)], 1)
                whole = uncached(model, ids)
            tolerance = 0.1 if bf16 else 1e-4
            assert (logits - whole).abs().max() < tolerance * whole.abs().max()


@pytest.mark.parametrize("attention", [{}, {"attention": MLA}], ids=["grouped", "latent"])
@pytest.mark.parametrize("first", [False, True])
def test_a_state_is_continued_in_another_precision(attention: dict[str, Any], first: bool) -> None:
    model, ids = model_of(**attention).eval(), torch.randint(0, V, (2, T))
    state, whole = model.init_state(2, capacity=T), uncached(model, ids)
    for part, bf16 in zip(ids.split([8, 9], 1), (first, not first), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = step(model, part, state)
    assert (logits - whole[:, 8:]).abs().max() < 0.1 * whole.abs().max()


def test_a_step_that_cannot_be_taken_is_refused() -> None:
    model = model_of()
    state = model.init_state(2, capacity=4, slack=2)
    refused: list[tuple[str, Any]] = [
        ("batch size is 1", lambda: model.step(torch.zeros(1, 1, dtype=torch.int64), state)),
        ("number of tokens is 5", lambda: model.step(torch.zeros(2, 5, dtype=torch.int64), state)),
        ("token id is 80", lambda: model.step(torch.full((2, 1), V), state)),
        ("tokens to take back is 1: allowed is 0 to 0", lambda: state.rollback(1)),
        ("capacity is 3", lambda: state.grow(3)),
        ("slack is -1", lambda: model.init_state(2, 4, -1)),
        ("capacity is 0", lambda: model.init_state(2, 0)),
    ]
    for message, call in refused:
        with pytest.raises(ConfigError, match=message):
            call()
    model.step(torch.zeros(2, 3, dtype=torch.int64), state)
    state.rollback(1)
    for n, message in ((2, "tokens to take back is 2: allowed is 0 to 1"), (-1, "tokens to take back is -1")):
        with pytest.raises(ConfigError, match=message):
            state.rollback(n)
    padded = model.init_state(2, capacity=4, slack=2)
    model.step(torch.zeros(2, 3, dtype=torch.int64), padded, torch.tensor([[True] * 3, [False, False, True]]))
    with pytest.raises(ConfigError, match=r"tokens to take back is 2: allowed is no more than sequences \[1\] have"):
        padded.rollback(2)
