"""Combining duplicates and moving rows: the C++ kernels against their references and against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engram.kernels import combine_rows, gather_rows, load_native, row_adam_
from engram.kernels.rows import combine_rows_reference, round_at_random, row_adam_reference_

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=80), st.integers(1, 33), st.sampled_from([torch.float32, torch.float64]))
def test_duplicates_are_summed_as_coalesce_sums_them(rows: list[int], width: int, dtype: torch.dtype) -> None:
    load_native()
    grads = torch.randn(len(rows), width, dtype=dtype, generator=torch.Generator().manual_seed(len(rows)))
    indices = torch.tensor(rows, dtype=torch.int64)
    expected = torch.sparse_coo_tensor(indices[None], grads, (31, width), check_invariants=True).coalesce()
    for combine in (combine_rows, combine_rows_reference):
        unique, sums = combine(indices, grads)
        assert torch.equal(unique, expected.indices()[0])
        torch.testing.assert_close(sums, expected.values())


def test_sums_of_bfloat16_are_taken_in_float32() -> None:
    load_native()
    grads = torch.full((300, 1), 1.0).bfloat16()  # 256 + 1 is 256 in bfloat16
    rows = torch.zeros(300, dtype=torch.int64)
    assert combine_rows(rows, grads)[1].item() == combine_rows_reference(rows, grads)[1].item() == 300


def state(n_rows: int, width: int, dtype: torch.dtype, by_row: bool, momentum: bool, seed: int = 0) -> list[Tensor]:
    """A table and what is kept of its rows, each last moved some steps ago."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)
    parts = [
        torch.randn(n_rows, width if momentum else 0, generator=g, dtype=torch.float64),
        torch.rand(n_rows, 1 if by_row else width, generator=g, dtype=torch.float64),
        torch.randint(0, 6, (n_rows, 1), generator=g).double(),
    ]
    return [
        torch.randn(n_rows, width, generator=g, dtype=torch.float64).to(dtype),
        torch.cat(parts, dim=1).to(wide),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("width", [1, 5, 16, 40])
def test_the_kernel_moves_rows_as_the_reference_does(
    dtype: torch.dtype, by_row: bool, momentum: bool, width: int
) -> None:
    """bfloat16 too: both draw the same random bits."""
    load_native()
    rows = torch.tensor([0, 3, 4, 17, 39])
    grads = torch.randn(5, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    options = {"step": 6, "lr": 0.01, "beta1": 0.9 * momentum, "beta2": 0.95, "eps": 1e-8, "seed": 12345}
    ours, theirs = (state(40, width, dtype, by_row, momentum) for _ in range(2))
    row_adam_(*ours, rows, grads, **options)  # type: ignore[arg-type]
    row_adam_reference_(*theirs, rows, grads, **options)  # type: ignore[arg-type]
    for x, y in zip(ours, theirs, strict=True):
        if x.dtype != torch.bfloat16:
            torch.testing.assert_close(x, y)
        else:  # the last bit of what is rounded may differ, and now and then tip the rounding
            assert (x != y).float().mean() < 0.02
            torch.testing.assert_close(x, y, rtol=2**-7, atol=0)


def test_rounding_at_random_is_right_in_the_mean_and_never_off_by_more_than_one_step() -> None:
    x = torch.tensor([1.0 + 2**-9, -3.0 - 2**-8, 1e-30, 0.0, 3e38, float("inf"), float("nan")])
    random = torch.arange(2**16).unsqueeze(1)  # every possible draw once
    drawn = round_at_random(x.expand(2**16, -1).contiguous(), random.expand(-1, len(x)))
    torch.testing.assert_close(drawn[:, :4].double().mean(0), x[:4].double(), rtol=1e-6, atol=0)
    assert drawn[:, 5].isinf().all()
    assert drawn[:, 6].isnan().all()
    assert drawn[:, 0].unique().tolist() == [1.0, 1.0 + 2**-7]


def test_the_operators_keep_their_promises_to_the_compiler() -> None:
    rows = torch.tensor([1, 1, 0])
    torch.library.opcheck(torch.ops.engram.combine_rows.default, (rows, torch.randn(3, 4)))
    moved = state(9, 4, torch.float32, False, True)
    arguments = (*moved, torch.tensor([0, 2]), torch.randn(2, 4), 7, 0.1, 0.9, 0.95, 1e-8, 0)
    torch.library.opcheck(torch.ops.engram.row_adam_.default, arguments)
    torch.library.opcheck(torch.ops.engram.gather_rows.default, (torch.randn(9, 4), torch.tensor([[0, 2], [8, 0]])))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.int8])
@pytest.mark.parametrize("shape", [(0,), (7,), (2, 3, 5), (3000,)])
def test_rows_are_gathered_in_any_type(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    load_native()
    table, rows = (50 * torch.randn(40, 7)).to(dtype), torch.randint(0, 40, shape)
    assert torch.equal(gather_rows(table, rows), table[rows])


@pytest.mark.parametrize("row", [-1, 40])
def test_a_row_beyond_the_table_is_refused(row: int) -> None:
    load_native()
    with pytest.raises(IndexError, match=f"row {row} of a table of 40 rows"):
        gather_rows(torch.zeros(40, 3), torch.tensor([0, row]))


def test_a_row_moved_at_a_later_step_is_decayed_as_the_reference_does() -> None:
    """As after a checkpoint was mixed with another's state."""
    load_native()
    options = {"step": 2, "lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "seed": 0}
    rows, grads = torch.tensor([0, 3]), torch.randn(2, 4)
    ours, theirs = (state(9, 4, torch.float32, False, True) for _ in range(2))
    for _, kept in (ours, theirs):
        kept[:, -1] = 8
    row_adam_(*ours, rows, grads, **options)  # type: ignore[arg-type]
    row_adam_reference_(*theirs, rows, grads, **options)  # type: ignore[arg-type]
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y)


def test_what_would_reach_beyond_rows_and_state_is_refused_by_name() -> None:
    load_native()
    options = {"step": 1, "lr": 0.1, "beta1": 0.9, "beta2": 0.9, "eps": 1e-8, "seed": 0}
    table, kept, rows, grads = torch.zeros(8, 3), torch.zeros(8, 7), torch.tensor([1]), torch.ones(1, 3)
    for beyond in (-1, 8, 10**9):
        with pytest.raises(IndexError, match=f"row {beyond} of a table of 8 rows"):
            row_adam_(table, kept, torch.tensor([beyond]), grads, **options)  # type: ignore[arg-type]
    for name, arguments in (
        ("row_state", (table, kept[:, :6], rows, grads)),
        ("grads", (table, kept, rows, grads[:, :2])),
        ("strides of table", (torch.zeros(8, 6)[:, :3], kept, rows, grads)),
        ("strides of table", (table, torch.zeros(7, 8).T, rows, grads)),
    ):
        with pytest.raises(ValueError, match=name):
            row_adam_(*arguments, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"grads is \[3, 4\]: allowed is \[5, 4\]"):
        combine_rows(torch.arange(5), torch.ones(3, 4))
    assert not table.any()
