"""The stacked Newton-Schulz iteration and its reference against the same formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engram.kernels import load_native, orthogonalize
from engram.kernels.orthogonalize import _COEFFICIENTS, _STEPS, orthogonalize_reference


@pytest.fixture(autouse=True)
def _native() -> None:
    load_native()


def by_singular_values(x: Tensor) -> Tensor:
    """The polynomial of the iteration taken of each singular value."""
    a, b, c = _COEFFICIENTS
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(_STEPS):
        s = a * s + b * s**3 + c * s**5
    return u * s.unsqueeze(-2) @ v


SHAPES = [(3, 64, 64), (2, 33, 64), (2, 64, 33), (5, 4, 64), (2, 7, 5), (1, 64, 448), (1, 1, 9), (1, 188, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_matrix_goes_where_its_singular_values_say(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = by_singular_values(x)
    for way in (orthogonalize, lambda x: orthogonalize_reference(x, _COEFFICIENTS, _STEPS)):
        got = way(x)
        assert got.dtype == torch.bfloat16
        assert got.is_contiguous()
        assert got.shape == x.shape
        assert (got.double() - exact).norm() < 0.03 * exact.norm()  # fifteen products in bfloat16


def test_one_matrix_does_not_depend_on_the_others_and_zeros_stay() -> None:
    x = torch.randn(4, 20, 40)
    x[2] = 0
    together = orthogonalize(x)
    assert not together[2].any()
    for one, alone in zip(together, x, strict=True):
        assert torch.equal(orthogonalize(alone.unsqueeze(0))[0], one)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 40), (3, 40, 8)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_spoils_only_itself(shape: tuple[int, ...], bad: float) -> None:
    x = torch.randn(shape)
    x[0, 2, 3] = bad
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # which then takes all matrices
    got = orthogonalize(x)
    torch.set_num_threads(before)
    assert [bool(one.isfinite().all()) for one in got] == [False, True, True]


def test_the_operator_keeps_its_promises_to_the_compiler() -> None:
    torch.library.opcheck(torch.ops.engram.orthogonalize.default, (torch.randn(2, 6, 4), _COEFFICIENTS, _STEPS))
