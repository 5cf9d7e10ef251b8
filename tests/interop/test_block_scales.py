"""Matrices in 8-bit floats with block scales: decoded by hand, and encoded so that nothing unchanged moves."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.interop.block_scales import decode, encode

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def stored(rows: int, columns: int, block_rows: int, scale: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.randint(0, 256, (rows, columns), dtype=torch.uint8).view(E4M3)
    shape = (-(-rows // block_rows), -(-columns // 32))
    low, high = (60, 190) if scale is None else (scale, scale + 1)
    return values, torch.randint(low, high, shape, dtype=torch.uint8).view(E8M0)


def test_each_value_has_the_scale_of_its_own_block() -> None:
    for block_rows in (1, 32):
        values, scales = stored(70, 70, block_rows)
        found = decode(values, scales, block_rows)
        for r, c in ((0, 0), (31, 31), (32, 31), (31, 32), (69, 69), (64, 63)):
            exponent = int(scales.view(torch.uint8)[r // block_rows, c // 32]) - 127
            torch.testing.assert_close(found[r, c], values[r, c].float() * 2.0**exponent, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 70),
    block_rows=st.sampled_from([1, 32]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 999),
)
def test_what_was_read_is_encoded_to_the_same_bytes(
    rows: int, columns: int, block_rows: int, dtype: torch.dtype, seed: int
) -> None:
    """Also NaN, zeros with a sign, and scales that no encoder would have chosen."""
    torch.manual_seed(seed)
    values, scales = stored(rows, columns, block_rows)
    again = encode(decode(values, scales, block_rows).to(dtype), values, scales, block_rows)
    assert torch.equal(again[0].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(again[1].view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize("block_rows", [1, 32])
def test_a_change_moves_its_own_block_alone_and_by_half_a_step_at_most(block_rows: int) -> None:
    values, scales = stored(64, 96, block_rows, scale=120)
    values = values.float().nan_to_num(1.0).to(E4M3)
    new = decode(values, scales, block_rows)
    new[40, 33] = 1000.0
    codes, powers = encode(new, values, scales, block_rows)
    rows = slice(40, 41) if block_rows == 1 else slice(32, 64)
    changed = torch.zeros(64, 96, dtype=torch.bool)
    changed[rows, 32:64] = True
    assert torch.equal(codes.view(torch.uint8)[~changed], values.view(torch.uint8)[~changed])
    assert (powers.view(torch.uint8) != scales.view(torch.uint8)).sum() == 1
    found, block = decode(codes, powers, block_rows)[rows, 32:64], new[rows, 32:64]
    # 1000 needs a scale of 4: 448 * 2 falls short of it.
    assert float(powers.float().max()) == 4.0
    assert ((found - block).abs() <= (block.abs() / 16).clamp_min(4.0 * 2**-10)).all()


@given(largest=st.floats(1e-30, 1e30))
@settings(max_examples=100, deadline=None)
def test_a_new_scale_is_the_smallest_power_of_two_that_holds_the_block(largest: float) -> None:
    new = torch.zeros(1, 32)
    new[0, 7] = largest
    values, scales = stored(1, 32, 1, scale=0)
    codes, powers = encode(new, values, scales, 1)
    scale = float(powers.float())
    assert math.log2(scale).is_integer()
    assert float(new[0, 7]) <= 448 * scale * (1 + 1e-6)
    assert float(new[0, 7]) > 448 * scale / 2 * (1 - 1e-6)
    torch.testing.assert_close(decode(codes, powers, 1), new, rtol=1 / 16, atol=0)


@pytest.mark.parametrize(("largest", "scale"), [(448.0, 1.0), (448.5, 2.0), (447.0, 1.0), (224.0, 0.5), (896.0, 2.0)])
def test_a_block_whose_largest_value_is_the_largest_of_e4m3_fits_as_it_is(largest: float, scale: float) -> None:
    values, scales = stored(1, 32, 1, scale=0)
    _, powers = encode(torch.full((1, 32), largest), values, scales, 1)
    assert float(powers.float()) == scale


def test_what_e4m3_lacks_becomes_nan_and_leaves_its_blocks_other_values_alone() -> None:
    for odd in (math.inf, -math.inf, math.nan):
        values, scales = stored(1, 32, 1, scale=130)
        new = torch.full((1, 32), 1000.0)
        new[0, 3] = odd
        found = decode(*encode(new, values, scales, 1), 1)
        assert found.isnan().nonzero().tolist() == [[0, 3]]
        torch.testing.assert_close(found[new == 1000], new[new == 1000], rtol=1 / 16, atol=0)


def test_a_block_of_zeros_is_zeros() -> None:
    values, scales = stored(1, 32, 1, scale=130)
    assert (decode(*encode(torch.zeros(1, 32), values, scales, 1), 1) == 0).all()
