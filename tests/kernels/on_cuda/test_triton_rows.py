"""Gathering rows, combining duplicates and moving rows in Triton against the references."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from engram.kernels.rows import combine_rows_reference, row_adam_reference_
from engram.kernels.triton import register
from engram.kernels.triton import rows as kernels
from engram.kernels.triton.rows import combine_rows_triton, gather_rows_triton, row_adam_triton_
from engram.memory import MemoryTable


@pytest.mark.parametrize("width", [1, 7, 80, 300, 600])
@pytest.mark.parametrize("shape", [(), (0,), (70,), (2, 3, 5)])
def test_rows_are_gathered(width: int, shape: tuple[int, ...], device: torch.device) -> None:
    table, rows = torch.randn(40, width, device=device), torch.randint(0, 40, shape, device=device)
    gathered = gather_rows_triton(table, rows)
    assert gathered.shape == (*shape, width)
    assert torch.equal(gathered, table[rows])


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex128],
)
def test_rows_of_any_type_are_gathered_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    """Also from a table that begins in the middle of memory, and by row numbers that lie apart."""
    table = torch.randint(0, 2, (41, 6 * dtype.itemsize), dtype=torch.uint8, device=device).view(dtype)[1:]
    rows = torch.randint(0, 40, (9, 2), device=device)[:, 1]
    assert torch.equal(gather_rows_triton(table, rows).view(torch.uint8), table.view(torch.uint8)[rows])


def test_a_device_gathers_by_the_kernel_and_reading_a_table_still_learns(device: torch.device) -> None:
    """The operator's promises to the compiler, and the row-sparse gradient of a table on the device."""
    if device.type == "cuda":
        assert register()
    table = MemoryTable(40, 5, std=1.0).to(device)
    rows = torch.tensor([[3, 39], [3, 0]], device=device)
    torch.library.opcheck(torch.ops.engram.gather_rows.default, (table.weight.detach(), rows))
    read = table(rows)
    assert torch.equal(read, table.weight[rows])
    read.sum().backward()
    grad = table.weight.grad
    assert grad is not None
    assert grad.is_sparse
    assert grad.to_dense().sum(1).tolist() == [5] + [0] * 2 + [10] + [0] * 35 + [5]


def test_rows_are_gathered_from_a_table_that_lies_in_strides(device: torch.device) -> None:
    table, rows = torch.randn(7, 40, device=device).T, torch.tensor([39, 0, 39], device=device)
    assert torch.equal(gather_rows_triton(table, rows), table[rows])


GATHER = "rows.gather_rows_triton(torch.zeros(40, 3).cuda(), ids)"
PICK = "elsewhere.pick_rows_triton(cache, torch.full_like(ids, -1), torch.zeros(40, 8).byte().pin_memory(), ids)"
HASH = "hashing.hash_ngrams_triton(ids[None], None, ids[None, :1] + 7, ids[None, :1], 0, [3, 5], [2], 0, 0, -1, 40)"
LOSS = "loss.cross_entropy_triton_(torch.zeros(2, 40).cuda(), ids)"


@pytest.mark.parametrize("number", [-1, 40, 2**40])
@pytest.mark.parametrize("call", [GATHER, PICK, HASH, LOSS], ids=["gather", "pick", "hash", "loss"])
def test_a_number_beyond_the_table_or_vocabulary_stops_the_device(call: str, number: int, device: torch.device) -> None:
    """In a process of its own: the device is lost to it."""
    if device.type != "cuda":
        pytest.skip("the interpreter leaves assertions out")
    program = (
        "import torch; from engram.kernels.triton import elsewhere, hashing, loss, rows; "
        f"ids, cache = torch.tensor([0, {number}]).cuda(), torch.zeros(1, 8).byte().cuda(); "
        f"{call}; torch.cuda.synchronize()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize("run", [16, 64])
@pytest.mark.parametrize(
    ("n", "different", "width"),
    [(80, 30, 5), (260, 180, 300), (1000, 3, 16), (2500, 1, 80), (1, 1, 1), (0, 1, 4)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_duplicates_are_summed(
    n: int,
    different: int,
    width: int,
    run: int,
    dtype: torch.dtype,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also rows so frequent that their gradients are summed in runs, and those in blocks."""
    monkeypatch.setattr(kernels, "_run", lambda n: run)
    rows, grads = torch.randint(0, different, (n,), device=device), torch.randn(n, width, device=device).to(dtype)
    (unique, sums), (theirs, expected) = combine_rows_triton(rows, grads), combine_rows_reference(rows, grads)
    assert torch.equal(unique, theirs)
    tolerance = {"rtol": 2**-7, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(sums, expected, **tolerance)


def test_rows_beyond_32_bits_are_combined(device: torch.device) -> None:
    rows = torch.tensor([2**40, 5, 2**31 - 1, 2**40, 2**31, 5], device=device)
    unique, sums = combine_rows_triton(rows, torch.arange(6.0, device=device)[:, None])
    assert unique.tolist() == [5, 2**31 - 1, 2**31, 2**40]
    assert sums.flatten().tolist() == [6, 2, 4, 3]


def test_more_runs_than_a_block_have_their_places(device: torch.device) -> None:
    counts, keys = torch.randint(0, 17, (9000,), device=device), torch.tensor([3, 4, 9], device=device)
    begun, found = counts.clone(), torch.zeros(2, dtype=torch.int64, device=device)
    kernels._place_kernel[(1,)](begun, keys, found, 3, 9000, BLOCK=4096)
    assert torch.equal(begun, counts.cumsum(0))
    assert found.tolist() == [int(counts.sum()), 9]


def test_runs_grow_with_the_gradients() -> None:
    assert [kernels._run(n) for n in (1, 30_000, 65_536, 262_144, 10**8)] == [16, 16, 32, 64, 64]


def test_sums_of_bfloat16_are_taken_in_float32(device: torch.device) -> None:
    grads = torch.full((300, 1), 1.0, device=device).bfloat16()  # 256 + 1 is 256 in bfloat16
    assert combine_rows_triton(torch.zeros(300, dtype=torch.int64, device=device), grads)[1].item() == 300


def state(
    device: torch.device, n_rows: int, width: int, dtype: torch.dtype, by_row: bool, momentum: bool
) -> list[Tensor]:
    """A table and what is kept of its rows, each last moved some steps ago."""
    g = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(n_rows, width if momentum else 0, generator=g),
        torch.rand(n_rows, 1 if by_row else width, generator=g),
        torch.randint(0, 6, (n_rows, 1), generator=g).float(),
    ]
    return [torch.randn(n_rows, width, generator=g).to(device, dtype), torch.cat(parts, dim=1).to(device)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("width", [1, 5, 16, 128, 300, 600])
def test_rows_move_as_the_references_do(
    dtype: torch.dtype, by_row: bool, momentum: bool, width: int, device: torch.device
) -> None:
    rows = torch.tensor([0, 3, 4, 17, 39], device=device)
    grads = torch.randn(5, width).to(device, dtype)
    options: list[Any] = [6, 0.01, 0.9 * momentum, 0.95, 1e-8, 12345]
    ours, theirs = (state(device, 40, width, dtype, by_row, momentum) for _ in range(2))
    row_adam_triton_(*ours, rows, grads, *options)
    row_adam_reference_(*theirs, rows, grads, *options)
    for x, y in zip(ours, theirs, strict=True):
        if x.dtype != torch.bfloat16:
            torch.testing.assert_close(x, y)
        else:  # a last bit that differs may now and then tip the rounding
            assert (x != y).float().mean() < 0.02
            torch.testing.assert_close(x, y, rtol=2**-7, atol=0)


@pytest.mark.parametrize("seed", [0, 1, -7, 2**40 + 3])
@pytest.mark.parametrize("step", [1, 16, 1000])
def test_bfloat16_rows_are_rounded_to_the_very_same_bits(seed: int, step: int, device: torch.device) -> None:
    """With powers of two everywhere but in the weights' last bits, all that comes before the rounding is exact."""
    tables = [torch.randn(64, 37, generator=torch.Generator().manual_seed(3)).to(device).bfloat16() for _ in range(2)]
    rows, grads = torch.arange(0, 64, 2, device=device), torch.full((32, 37), 0.5, device=device).bfloat16()
    for table, move in zip(tables, (row_adam_triton_, row_adam_reference_), strict=True):
        move(table, torch.zeros(64, 38, device=device), rows, grads, step, 2**-12, 0.0, 0.0, 0.0, seed)
    assert torch.equal(*tables)
    assert (tables[0][::2] != tables[0][::2].round()).any()


def test_what_is_not_finite_stays_so(device: torch.device) -> None:
    worst = torch.tensor([[float("inf"), -float("inf"), float("nan"), 3.38e38]], device=device).bfloat16()
    tables = [worst.clone() for _ in range(2)]
    rows, grads = torch.zeros(1, dtype=torch.int64, device=device), torch.ones(1, 4, device=device).bfloat16()
    for table, move in zip(tables, (row_adam_triton_, row_adam_reference_), strict=True):
        move(table, torch.zeros(1, 5, device=device), rows, grads, 1, 1e-3, 0.0, 0.9, 1e-8, 0)
    torch.testing.assert_close(*tables, equal_nan=True, rtol=0, atol=0)
    assert tables[0][0, :2].isinf().all()
    assert tables[0][0, 2].isnan()


@pytest.mark.parametrize("missed", [3, 2000])
def test_without_memory_a_rows_moments_are_those_of_its_last_gradient(missed: int, device: torch.device) -> None:
    """However long ago it moved before: beta2 of 0, so that it moves by the rate."""
    table, kept = torch.zeros(1, 4, device=device), torch.full((1, 9), 100.0, device=device)
    kept[:, 8] = 1
    row, grad = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1, 4), 0.5, device=device)
    row_adam_triton_(table, kept, row, grad, 1 + missed, 0.01, 0.9, 0.0, 0.0, 0)
    assert kept[:, 4:8].eq(0.25).all()


def test_no_rows_change_nothing(device: torch.device) -> None:
    table, kept = state(device, 5, 4, torch.bfloat16, False, False)
    before = table.clone()
    rows, grads = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, 4, device=device).bfloat16()
    row_adam_triton_(table, kept, rows, grads, 1, 0.1, 0.0, 0.9, 1e-8, 0)
    assert torch.equal(table, before)
