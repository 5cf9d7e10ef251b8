"""Batched Muon: what torch's Muon does to a matrix, for every matrix of a stack at once."""

import pytest
import torch
from torch import nn

from engram.config import ConfigError
from engram.kernels import orthogonalize
from engram.training.optim import BatchedMuon

SETTINGS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("shape", [(5, 32, 32), (3, 24, 64), (4, 64, 24), (1, 17, 9)])
def test_each_matrix_moves_as_with_torch_muon(shape: tuple[int, int, int]) -> None:
    stack = nn.Parameter(torch.randn(shape))
    singles = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    ours = BatchedMuon([stack], **SETTINGS)
    theirs = torch.optim.Muon(singles, nesterov=True, adjust_lr_fn="match_rms_adamw", **SETTINGS)
    start = stack.detach().clone()
    for _ in range(6):
        stack.grad = torch.randn(shape)
        for single, gradient in zip(singles, stack.grad, strict=True):
            single.grad = gradient.clone()
        ours.step()
        theirs.step()
    expected = torch.stack([single.detach() for single in singles])
    moved = (expected - start).abs().max()
    # Both iterate in bfloat16 (8 bits); products of other batch shapes may round otherwise.
    assert (stack - expected).abs().max() < 0.02 * moved


def test_matrices_of_many_shapes_each_move_as_with_torch_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one shape, cut where they grow too large; a matrix without a gradient stays out."""
    monkeypatch.setattr("engram.training.optim.muon._TOGETHER", 3 * 24 * 32)
    shapes = [(24, 32), (32, 24), (24, 32), (16, 16), (24, 32), (24, 32), (32, 24)]
    weights = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    singles = [nn.Parameter(weight.detach().clone()) for weight in weights]
    start = [weight.detach().clone() for weight in weights]
    ours = BatchedMuon(weights, **SETTINGS)
    theirs = torch.optim.Muon(singles, nesterov=True, adjust_lr_fn="match_rms_adamw", **SETTINGS)
    for step in range(4):
        for i, (weight, single) in enumerate(zip(weights, singles, strict=True)):
            weight.grad = None if i == 3 and step == 1 else torch.randn(weight.shape)
            single.grad = None if weight.grad is None else weight.grad.clone()
        ours.step()
        theirs.step()
    for weight, single, before in zip(weights, singles, start, strict=True):
        assert (weight - single).abs().max() < 0.02 * (single - before).abs().max()


def test_an_update_points_along_the_nearest_orthogonal_matrix() -> None:
    """U V^T of the singular value decomposition; Newton-Schulz brings singular values near 1, not to it."""
    matrices = torch.randn(4, 20, 50)
    u, _, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    update = orthogonalize(matrices).double()
    cosine = (update * (u @ vt)).sum((-2, -1)) / (update.norm(dim=(-2, -1)) * (u @ vt).norm(dim=(-2, -1)))
    assert (cosine > 0.97).all()
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_experts_do_not_see_each_other() -> None:
    matrices = torch.randn(3, 12, 12)
    changed = matrices.clone()
    changed[1] *= 100
    changed[1, 0] = 0
    same = [0, 2]
    assert torch.equal(orthogonalize(matrices)[same], orthogonalize(changed)[same])


def test_an_expert_without_tokens_only_decays() -> None:
    stack = nn.Parameter(torch.randn(2, 8, 8))
    before = stack.detach().clone()
    stack.grad = torch.randn(2, 8, 8)
    stack.grad[1] = 0
    BatchedMuon([stack], **SETTINGS).step()
    torch.testing.assert_close(stack[1], before[1] * (1 - 0.02 * 0.1))
    assert (stack[0] - before[0]).abs().max() > 0.001


def test_its_state_comes_back_to_the_last_bit() -> None:
    gradients = torch.randn(8, 2, 8, 8)

    def run(stack: nn.Parameter, optimizer: BatchedMuon, numbers: range) -> None:
        for number in numbers:
            stack.grad = gradients[number].clone()
            optimizer.step()

    start = torch.randn(2, 8, 8)
    whole, parts = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    run(whole, BatchedMuon([whole], **SETTINGS), range(8))
    first = BatchedMuon([parts], **SETTINGS)
    run(parts, first, range(4))
    second = BatchedMuon([parts], lr=1.0)
    second.load_state_dict(first.state_dict())
    run(parts, second, range(4, 8))
    assert torch.equal(whole, parts)


@pytest.mark.parametrize(("name", "value"), [("lr", -1.0), ("momentum", 1.0), ("weight_decay", -0.1)])
def test_settings_that_cannot_be_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        BatchedMuon([nn.Parameter(torch.zeros(1, 2, 2))], **{name: value})
