"""`fuse_memory` and its backward in Triton against their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engram.kernels.fusion import fuse_memory_backward_reference, fuse_memory_reference
from engram.kernels.triton import fusion_forward_taps, launch
from engram.kernels.triton.fusion_backward import fuse_memory_backward_triton
from engram.kernels.triton.fusion_forward import fuse_memory_triton
from engram.kernels.triton.launch import Machine

SHAPE = {"B": 2, "T": 11, "M": 2, "D": 24, "taps": 4, "dilation": 3, "past": 0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "documents and padding": {"packed": True},
    "residual": {"packed": True, "residual": True},
    "no convolution": {"taps": 0, "packed": True, "residual": True},
    "no convolution, several blocks": {"taps": 0, "D": 300, "M": 3, "T": 5},
    "no squashing": {"squash": False, "taps": 3, "dilation": 2},
    "one token": {"T": 1, "M": 4},
    "one token and a past": {"T": 1, "M": 4, "past": 9, "packed": True},
    "a long past": {"T": 7, "M": 1, "past": 12, "taps": 3, "dilation": 2, "packed": True},
    "a short past": {"T": 12, "M": 3, "D": 19, "past": 5},
    "one number": {"B": 1, "T": 1, "M": 1, "D": 1},
    "one tap": {"taps": 1, "packed": True},
    "many taps": {"taps": 7, "dilation": 1, "packed": True},
    "several blocks": {"M": 3, "D": 300, "T": 5, "packed": True, "residual": True},
    "several runs": {"T": 15, "M": 3, "D": 130, "packed": True},
}
TYPES = [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def inputs(
    device: torch.device,
    B: int,
    T: int,
    M: int,
    D: int,
    taps: int,
    dilation: int,
    past: int,
    packed: bool = False,
    squash: bool = True,
    residual: bool = False,
    hidden: torch.dtype = torch.float32,
    kv: torch.dtype = torch.float32,
) -> list[Any]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape)

    documents = None
    if packed:
        documents = (torch.rand(B, past + T) < 0.2).long().cumsum(1)
        documents[torch.rand(B, past + T) < 0.15] = -1
    tensors = [
        normal(B, T, M, D).to(hidden),
        normal(B, T, (M + 1) * D).to(kv),
        1 + 0.3 * normal(M, D),
        1 + 0.3 * normal(M, D),
        1 + 0.3 * normal(M, D) if taps else None,
        normal(taps, M, D) if taps else None,
        documents,
        normal(B, past, D).to(kv) if past else None,
        torch.rand(B, past, M) if past else None,
    ]
    return [*(None if x is None else x.to(device) for x in tensors), 1e-5, squash, dilation, residual]


def close(ours: Tensor, theirs: Tensor, narrow: bool) -> None:
    """Within rounding, of each number and of the largest."""
    assert ours.dtype == theirs.dtype
    scale = theirs.abs().max().float().clamp_min(1e-3) if theirs.numel() else 1
    tolerance = {"rtol": 2**-7, "atol": 2**-7} if narrow else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(ours.float() / scale, theirs.float() / scale, **tolerance)


def check_forward(arguments: list[Any], narrow: bool) -> tuple[Tensor, Tensor, Tensor]:
    theirs = fuse_memory_reference(*arguments)
    for our, their in zip(fuse_memory_triton(*arguments), theirs, strict=True):
        close(our, their, narrow)
    return theirs


def check(arguments: list[Any], through_gates: bool, narrow: bool) -> None:
    out, alpha, stats = check_forward(arguments, narrow)
    grad_alpha = torch.randn_like(alpha) if through_gates else None
    backward = [torch.randn_like(out), grad_alpha, *arguments[:9], alpha, stats, *arguments[9:]]
    grads = zip(fuse_memory_backward_triton(*backward), fuse_memory_backward_reference(*backward), strict=True)
    for ours, theirs in grads:
        close(ours, theirs, narrow)


@pytest.mark.parametrize("case", CASES)
def test_kernels_follow_their_references(case: str, device: torch.device) -> None:
    check(inputs(device, **SHAPE | CASES[case]), True, narrow=False)


@pytest.mark.parametrize("taps", [0, 4])
def test_gates_need_not_have_a_gradient_of_their_own(taps: int, device: torch.device) -> None:
    check(inputs(device, **SHAPE | {"taps": taps, "packed": True}), False, narrow=False)


LAUNCHES: dict[str, dict[str, Any]] = {
    "no documents": {"packed": False},
    "four branches": {"M": 4},
    "taps that reach beyond a chunk": {"taps": 3, "dilation": 9},
    "taps that reach beyond the sequence": {"B": 5, "T": 9, "dilation": 8},
    "a past": {"past": 9, "residual": True},
    "no convolution": {"taps": 0},
}


def small_chunks(monkeypatch: pytest.MonkeyPatch, steps: int, tokens: int) -> None:
    """Of some steps of the dilation each, and results about `tokens` behind gates, by several programs."""
    monkeypatch.setattr(launch, "TURN_STEPS", steps)
    monkeypatch.setattr(launch, "TURN_TOKENS", tokens)
    monkeypatch.setattr(launch, "machine", lambda device: Machine(3, 50 * 2**20))


@pytest.mark.parametrize("case", LAUNCHES)
@pytest.mark.parametrize(("steps", "tokens", "chunk", "lag"), [(2, 7, 6, 2), (1, 0, 3, 0)])
def test_chunks_do_not_show(
    case: str, steps: int, tokens: int, chunk: int, lag: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 46 tokens, which are no multiple of a chunk; nor are the 23 of a sequence."""
    small_chunks(monkeypatch, steps, tokens)
    turns = launch.Turns.of(N=46, M=1, D=24, taps=4, dilation=3, warps=1, device=device)
    assert (turns.chunk, turns.lag) == (chunk, lag)
    assert turns.programs > 1
    check_forward(inputs(device, **SHAPE | {"T": 23, "M": 1, "packed": True} | LAUNCHES[case]), narrow=False)


@pytest.mark.parametrize("narrow", [False, True])
def test_norms_may_be_multiplied_beforehand(
    narrow: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are for many tokens."""
    monkeypatch.setattr(fusion_forward_taps, "_MANY", 1)
    types = {"hidden": torch.bfloat16, "kv": torch.bfloat16} if narrow else {}
    check_forward(inputs(device, **SHAPE | {"packed": True}, **types), narrow=narrow)


@pytest.mark.parametrize("case", LAUNCHES)
def test_runs_do_not_show(case: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward's runs, of 6 tokens each where the dilation is 3."""
    monkeypatch.setattr(launch, "machine", lambda device: Machine(2, 50 * 2**20))
    check(inputs(device, **SHAPE | {"T": 23, "M": 1, "packed": True} | LAUNCHES[case]), True, narrow=False)


@pytest.mark.parametrize("long", [7, 23, 80])
def test_runs_may_lie_within_a_document(long: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs of 21 tokens the backward takes 9 at a time that have all their taps."""
    monkeypatch.setattr(launch, "machine", lambda device: Machine(1, 50 * 2**20))
    arguments = inputs(device, **SHAPE | {"B": 1, "T": 80})
    arguments[6] = (torch.arange(80, device=device) // long).expand(1, -1)
    check(arguments, True, narrow=False)


@pytest.mark.parametrize("M", [1, 4])
def test_chunks_and_runs_do_not_show_in_bfloat16(M: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 2, 7)
    types = {"hidden": torch.bfloat16, "kv": torch.bfloat16}
    check(inputs(device, **SHAPE | {"T": 17, "M": M, "packed": True, "residual": True}, **types), False, narrow=True)


def test_documents_may_change_where_the_taps_of_a_chunk_reach(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The taps of the chunk that begins at a sequence's token 18 reach back to its token 9."""
    small_chunks(monkeypatch, 2, 7)
    boundaries = torch.arange(9, 20, device=device)
    arguments = inputs(device, **SHAPE | {"B": len(boundaries), "T": 24, "M": 1})
    arguments[6] = (torch.arange(24, device=device) >= boundaries.unsqueeze(1)).long()
    check_forward(arguments, narrow=False)


@pytest.mark.parametrize("past", [0, 2])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_document(bad: float, past: int, device: torch.device) -> None:
    """Results of the documents after it, and gradients of those before it, are what they are beside finite numbers."""
    T, D = 6 - past, 8
    arguments = inputs(device, **SHAPE | {"T": T, "M": 1, "D": D, "taps": 3, "dilation": 1, "past": past})
    arguments[6] = torch.tensor([[0] * 3 + [1] * 3, [0] * 6], device=device)
    calm = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    first, second = slice(0, 3 - past), slice(3 - past, None)  # documents of the first sequence
    arguments[1][0, first, D:] = bad
    outs = []
    for given in (arguments, calm):
        out, alpha, stats = fuse_memory_triton(*given)
        grad = torch.ones_like(out)
        if given is arguments:
            grad[1] = bad
        grad_kv = fuse_memory_backward_triton(grad, None, *given[:9], alpha, stats, *given[9:])[1]
        outs.append((out, grad_kv))
    (out, grad_kv), (calm_out, calm_grad) = outs
    assert not out[0, first].isfinite().all()
    assert torch.equal(out[0, second], calm_out[0, second])
    assert torch.equal(out[1], calm_out[1])
    assert torch.equal(grad_kv[0, second], calm_grad[0, second])


STEPS: dict[str, dict[str, Any]] = {
    "a token, taps beyond the past": {"T": 1, "past": 5, "M": 3},
    "a past longer than the taps": {"T": 3, "past": 12, "M": 1, "D": 33},
    "no past": {"T": 3, "M": 2},
    "fifteen taps": {"T": 2, "past": 25, "taps": 15, "dilation": 2, "D": 19, "M": 1},
    "one tap": {"taps": 1, "T": 2, "past": 2, "M": 1},
    "several blocks of channels": {"T": 1, "past": 9, "M": 1, "D": 2100, "squash": False},
    "several blocks, not all at once": {"B": 1, "T": 1, "past": 9, "taps": 10, "dilation": 1, "M": 1, "D": 2100},
}


@pytest.mark.parametrize("case", STEPS)
def test_steps_follow_their_reference(case: str, device: torch.device) -> None:
    """Up to as many tokens as the dilation, among which no tap reaches from one to another."""
    check_forward(inputs(device, **SHAPE | {"packed": True, "residual": True} | STEPS[case]), narrow=False)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_take_narrow_types(weights: torch.dtype, device: torch.device) -> None:
    types = {"hidden": torch.bfloat16, "kv": torch.bfloat16}
    arguments = inputs(device, **SHAPE | {"T": 2, "M": 3, "past": 9}, **types)
    arguments[2:6] = [x.to(weights) for x in arguments[2:6]]
    check_forward(arguments, narrow=True)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_past_of_another_document_stays_there(bad: float, device: torch.device) -> None:
    arguments = inputs(device, **SHAPE | {"T": 1, "past": 9})
    arguments[6] = torch.tensor([[0] * 5 + [1] * 5, [0] * 10], device=device)
    calm = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
    arguments[7][0, :5] = bad
    arguments[8][0, 3] = bad
    for ours, theirs in zip(fuse_memory_triton(*arguments), fuse_memory_reference(*calm), strict=True):
        close(ours, theirs, narrow=False)


def test_steps_need_no_scales_of_the_past(device: torch.device) -> None:
    """Which are then zeros."""
    arguments = inputs(device, **SHAPE | {"T": 2, "past": 9})
    arguments[8] = None
    check_forward(arguments, narrow=False)


@pytest.mark.parametrize(("hidden", "kv"), TYPES)
@pytest.mark.parametrize("M", [1, 3, 4])
def test_all_pairs_of_types(hidden: torch.dtype, kv: torch.dtype, M: int, device: torch.device) -> None:
    few = {"T": 4, "dilation": 1, "past": 2, "packed": True}
    arguments = inputs(device, **SHAPE | few | {"M": M}, hidden=hidden, kv=kv)
    check(arguments, True, narrow=torch.bfloat16 in (hidden, kv))


def test_float64_is_computed_in_float64(device: torch.device) -> None:
    arguments = [x.double() if isinstance(x, Tensor) else x for x in inputs(device, **SHAPE)]
    ours, theirs = fuse_memory_triton(*arguments), fuse_memory_reference(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def test_no_tokens_have_no_gradients(device: torch.device) -> None:
    arguments = inputs(device, **SHAPE | {"T": 0})
    out, alpha, stats = fuse_memory_triton(*arguments)
    grads = fuse_memory_backward_triton(out, None, *arguments[:9], alpha, stats, *arguments[9:])
    assert out.shape == (2, 0, 2, 24)
    assert all(grad.abs().sum() == 0 for grad in grads[2:])


def test_the_same_inputs_give_the_same_bits(device: torch.device) -> None:
    arguments = inputs(device, **SHAPE | {"packed": True})
    out, alpha, stats = fuse_memory_triton(*arguments)
    backward = [torch.randn_like(out), None, *arguments[:9], alpha, stats, *arguments[9:]]
    again = zip(fuse_memory_backward_triton(*backward), fuse_memory_backward_triton(*backward), strict=True)
    assert all(torch.equal(x, y) for x, y in again)
