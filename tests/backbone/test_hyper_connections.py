"""Hyper-connections: doubly stochastic mixing, a plain residual at the start, and the paper's equations in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.backbone.residual import HyperConnection, PlainResidual, build_residual, sinkhorn

D = 6


def random_connection(branches: int, d_model: int = D, mixing: float = 0.7) -> HyperConnection:
    """A float64 connection away from its start; `mixing` is the spread of what Sinkhorn's logits start from."""
    connection = HyperConnection(branches, d_model, 1e-6).double()
    for parameter in connection.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    torch.nn.init.normal_(connection.static[2 * branches :], std=mixing)
    return connection


@settings(max_examples=30, deadline=None)
@given(M=st.integers(2, 6), seed=st.integers(0, 10**6), signs=st.booleans())
def test_mixing_matrices_are_doubly_stochastic(M: int, seed: int, signs: bool) -> None:
    """Rows exactly, since they are divided last; columns as far as 20 steps bring them.

    For logits in [-1, 1] every step brings the scales of the columns closer by tanh(1)^2 at least (Birkhoff and Hopf),
    which leaves 2 tanh(1)^39 = 5e-5 between the logarithms of the columns' sums. The worst of 30,000 was 1.1e-6.
    """
    logits = torch.rand(5, M, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1
    mixed = sinkhorn(logits.sign() if signs else logits)
    ones = torch.ones(5, M, dtype=torch.float64)
    assert (mixed > 0).all()
    torch.testing.assert_close(mixed.sum(-1), ones, rtol=0, atol=1e-9)
    torch.testing.assert_close(mixed.sum(-2), ones, rtol=0, atol=5e-5)


def test_one_branch_is_a_plain_residual() -> None:
    assert isinstance(build_residual(1, D, 1e-6), PlainResidual)
    h, y = torch.randn(2, 3, D), torch.randn(2, 3, D)
    x, mixing = PlainResidual().read(h)
    assert torch.equal(x, h)
    assert torch.equal(PlainResidual().write(h, y, mixing), h + y)


@pytest.mark.parametrize("M", [2, 4])
def test_at_the_start_equal_branches_are_a_plain_residual_within_half_a_percent(M: int) -> None:
    """The maps that depend on the token are there from the start, and small: 0.2 % was the most of 30 draws."""
    connection = HyperConnection(M, 64, 1e-6)
    h, y = torch.randn(2, 50, 64), torch.randn(2, 50, 64)
    equal = h.unsqueeze(2).expand(-1, -1, M, -1)
    x, mixing = connection.read(equal)
    assert (x - h).norm() < 0.005 * h.norm()
    for branch in connection.write(equal, y, mixing).unbind(2):
        assert (branch - (h + y)).norm() < 0.005 * (h + y).norm()


@pytest.mark.parametrize("M", [2, 4])
def test_at_the_start_unequal_branches_stay_themselves(M: int) -> None:
    """A branch keeps 1 / (1 + (M - 1) e^-4) of itself, 0.95 for M = 4, and the others share the rest."""
    own = 1 / (1 + (M - 1) * torch.tensor(-4.0).exp())
    expected = torch.full((M, M), (1 - own) / (M - 1)).fill_diagonal_(float(own))
    h = torch.randn(2, 50, M, 64)
    _, mixing = HyperConnection(M, 64, 1e-6).read(h)
    torch.testing.assert_close(mixing.res, expected.expand_as(mixing.res), rtol=0, atol=0.005)


def test_output_is_that_of_the_equations() -> None:
    M = 3
    connection = random_connection(M, mixing=6.0)
    h, y = torch.randn(1, 2, M, D, dtype=torch.float64), torch.randn(1, 2, D, dtype=torch.float64)
    x, mixing = connection.read(h)
    out = connection.write(h, y, mixing)
    for t in range(2):
        flat = h[0, t].reshape(-1)
        normed = flat / torch.sqrt((flat * flat).mean() + 1e-6) * connection.norm.weight
        maps = connection.dynamic.weight @ normed
        a_pre, a_post, a_res = connection.factor
        pre = 1 / (1 + torch.exp(-(a_pre * maps[:M] + connection.static[:M])))
        post = 2 / (1 + torch.exp(-(a_post * maps[M : 2 * M] + connection.static[M : 2 * M])))
        res = torch.exp(a_res * maps[2 * M :] + connection.static[2 * M :]).reshape(M, M)
        for _ in range(20):
            res = res / res.sum(0, keepdim=True)  # each column's sum
            res = res / res.sum(1, keepdim=True)  # each row's sum
        # Still on its way to doubly stochastic, so that the order of the steps and their number show.
        assert (res.sum(0) - 1).abs().max() > 1e-3
        torch.testing.assert_close(x[0, t], sum(pre[m] * h[0, t, m] for m in range(M)))
        for m in range(M):
            expected = sum(res[m, n] * h[0, t, n] for n in range(M)) + post[m] * y[0, t]
            torch.testing.assert_close(out[0, t, m], expected)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_gradients_of_sinkhorn_are_those_of_finite_differences(scale: float) -> None:
    logits = scale * torch.randn(2, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(sinkhorn, logits.requires_grad_())


def test_gradients_of_a_connection_are_those_of_finite_differences() -> None:
    M, width = 2, 3
    connection = random_connection(M, width)

    def read_and_write(h: Tensor, y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters are varied in place."""
        x, mixing = connection.read(h)
        return x, connection.write(h, y, mixing)

    h = torch.randn(1, 2, M, width, dtype=torch.float64, requires_grad=True)
    y = torch.randn(1, 2, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(read_and_write, (h, y, *connection.parameters()))
