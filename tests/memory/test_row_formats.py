"""Quantized rows against the bounds that their codes allow, over rows of any scale."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.config import ConfigError
from engram.memory import MemoryTable
from engram.memory.row_formats import BlockFloat8Rows, RowKind, row_format

TYPES = [torch.float32, torch.bfloat16]
QUANTIZED = [kind for kind in get_args(RowKind) if kind != "float"]


def drawn(seed: int, width: int, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose numbers differ in magnitude by several orders."""
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(6, width, generator=g) * torch.randn(6, width, generator=g).exp()).to(dtype)


ROWS = st.builds(
    drawn, st.integers(0, 2**31), st.integers(1, 70), st.sampled_from([1e-30, 1e-3, 1.0, 1e20]), st.sampled_from(TYPES)
)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_floats_come_back_as_they_were(values: torch.Tensor) -> None:
    fmt = row_format("float", values.shape[1], values.dtype)
    records = fmt.encode(values)
    assert records.shape == (6, fmt.row_bytes)
    assert torch.equal(fmt.decode(records), values)


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_int8_rows_are_off_by_half_a_step_of_their_largest_number(values: torch.Tensor) -> None:
    fmt = row_format("int8", values.shape[1], values.dtype)
    records = fmt.encode(values)
    assert records.shape == (6, values.shape[1] + 4)
    x, back = values.double(), fmt.decode(records).double()
    bound = x.abs().amax(1, keepdim=True) / 127 / 2
    rounding = x.abs() * 2 * torch.finfo(values.dtype).eps + 1e-40
    assert ((back - x).abs() <= 1.001 * bound + rounding).all()


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_fp8_numbers_are_off_by_a_sixteenth_of_themselves(values: torch.Tensor) -> None:
    fmt = row_format("fp8", values.shape[1], values.dtype)
    x, back = values.double(), fmt.decode(fmt.encode(values)).double()
    # e4m3: 3 bits of mantissa, and steps of 2^-9 below 2^-6, of a scale that makes the largest number 448.
    smallest = x.abs().amax(1, keepdim=True) / 448 * 2**-10
    rounding = x.abs() * 2 * torch.finfo(values.dtype).eps + 1e-40
    assert ((back - x).abs() <= 1.001 * torch.maximum(x.abs() / 16, smallest) + rounding).all()


@settings(max_examples=60, deadline=None)
@given(ROWS)
def test_each_block_of_32_has_the_least_power_of_two_that_holds_it(values: torch.Tensor) -> None:
    """And its numbers are off by a sixteenth of themselves, or a step of that scale."""
    fmt = row_format("fp8_block32", values.shape[1], values.dtype)
    records, (R, width) = fmt.encode(values), values.shape
    assert records.shape == (R, width + math.ceil(width / 32))
    back = fmt.decode(records)
    for r in range(R):
        for block, byte in enumerate(records[r, width:].tolist()):
            x, y = (v[r, 32 * block : 32 * block + 32].double() for v in (values, back))
            scale, largest = 2.0 ** (byte - 127), float(x.abs().max())
            assert largest <= 448 * scale * (1 + 1e-6)
            assert largest > 448 * scale / 2 * (1 - 1e-6) or byte == 1 or largest == 0
            assert ((y - x).abs() <= torch.maximum(x.abs() / 16, torch.tensor(scale / 1024))).all()


@pytest.mark.parametrize("width", [64, 40])
@pytest.mark.parametrize("dtype", TYPES)
def test_what_blocks_of_fp8_hold_comes_back_exactly(width: int, dtype: torch.dtype) -> None:
    """Every finite code under many scales, against sign, exponent and mantissa by hand."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(width)[torch.randperm(256 * width)].view(256, width)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    powers = torch.randint(20, 230, (256, 2), dtype=torch.uint8)
    sign, exponent, mantissa = 1 - 2.0 * (codes >> 7), (codes >> 3 & 15).double(), (codes & 7) / 8
    values = sign * torch.where(exponent > 0, (1 + mantissa) * 2 ** (exponent - 7), mantissa.double() * 2.0**-6)
    expected = values * 2.0 ** (powers.double() - 127).repeat_interleave(32, 1)[:, :width]
    fmt = BlockFloat8Rows(width, dtype)
    found = fmt.decode(torch.cat([codes, powers], 1))
    assert found.dtype == dtype
    assert torch.equal(found.double(), expected)
    assert torch.equal(fmt.decode(fmt.encode(found)).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, *TYPES])
def test_blocks_of_fp8_hold_the_largest_numbers_of_a_type(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.linspace(0.9 * largest, largest, 320, dtype=torch.float64).to(dtype).view(10, 32)
    values[:, ::2] *= -1
    fmt = row_format("fp8_block32", 32, dtype)
    error = (fmt.decode(fmt.encode(values)).double() - values.double()).abs()
    assert (error <= values.double().abs() / 16).all()


@pytest.mark.parametrize(("kind", "steps"), [("int8", 2), ("fp8", 1024)])
def test_numbers_near_zero_are_off_by_a_step_of_the_least_scale(kind: RowKind, steps: int) -> None:
    values = torch.linspace(-1e-36, 1e-36, 64).view(1, 64)
    fmt = row_format(kind, 64, torch.float32)
    error = (fmt.decode(fmt.encode(values)) - values).abs()
    relative = values.abs() / 16 if kind == "fp8" else torch.zeros(())
    assert (error <= torch.maximum(relative, torch.tensor(2.0**-126 / steps)) * 1.001 + 1e-44).all()


@pytest.mark.parametrize("kind", get_args(RowKind))
@pytest.mark.parametrize("dtype", TYPES)
def test_values_lie_side_by_side_as_a_compiler_was_told(kind: RowKind, dtype: torch.dtype) -> None:
    fmt = row_format(kind, 24, dtype)
    assert fmt.decode(fmt.encode(torch.randn(3, 2, 24))).is_contiguous()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_rows_of_zeros_stay_zeros(kind: RowKind) -> None:
    fmt = row_format(kind, 5, torch.float32)
    assert torch.equal(fmt.decode(fmt.encode(torch.zeros(3, 5))), torch.zeros(3, 5))


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("dtype", TYPES)
def test_a_quantized_table_takes_a_byte_a_number_and_its_scales_and_gives_its_own_type(
    kind: RowKind, dtype: torch.dtype
) -> None:
    table = MemoryTable(50, 64, dtype)
    quantized = table.read_only(kind)
    assert quantized.records.nbytes == 50 * (64 + (2 if kind == "fp8_block32" else 4))
    rows = torch.randint(0, 50, (2, 3, 4))
    with torch.no_grad():
        values = quantized(rows)
        assert values.dtype == dtype
        assert 0 < (values - table(rows)).abs().max() <= table.weight.abs().max() / 14


@pytest.mark.parametrize(("kind", "largest"), [("int8", 0.011), ("fp8", 0.036), ("fp8_block32", 0.042)])
def test_the_relative_error_of_normal_rows(kind: RowKind, largest: float) -> None:
    """Root mean square over the row's own: what docs/inference.md says."""
    values = torch.randn(2000, 64)
    fmt = row_format(kind, 64, torch.float32)
    error = (fmt.decode(fmt.encode(values)) - values).norm(dim=1) / values.norm(dim=1)
    assert largest / 2 < error.median() < error.max() < largest


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_single_row_is_read_as_many_are(kind: RowKind) -> None:
    table = MemoryTable(9, 5).read_only(kind)
    with torch.no_grad():
        together = table(torch.arange(9))
        for row in range(9):
            assert torch.equal(table(torch.tensor([row])), together[row : row + 1])


@pytest.mark.parametrize("kind", QUANTIZED)
def test_numbers_that_are_not_finite_are_refused(kind: RowKind) -> None:
    fmt = row_format(kind, 2, torch.float32)
    with pytest.raises(ConfigError, match="finite"):
        fmt.encode(torch.tensor([[1.0, float("inf")]]))


def test_other_formats_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="int3"):
        row_format("int3", 4, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="fp8"):
        MemoryTable(4, 4).read_only("int8").read_only("fp8")
