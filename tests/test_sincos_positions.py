"""Positions at any coordinates: by hand, as the authors' tables, and as means over places that are no points."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from adaptive_llava.modeling.sincos_positions import enlarged_positions, sincos_positions, wave_frequency


pytestmark = pytest.mark.compat


def square(side: int, dim: int) -> torch.Tensor:
    return sincos_positions(torch.arange(side), torch.arange(side), dim)


def test_columns_come_first_and_sines_before_cosines():
    # width 8: two waves per axis, of 1 and 1/100 radians per patch
    (position,) = sincos_positions(torch.tensor([1.5]), torch.tensor([2.0]), 8)
    column = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02)]
    row = [math.sin(1.5), math.sin(0.015), math.cos(1.5), math.cos(0.015)]
    torch.testing.assert_close(position, torch.tensor(column + row), rtol=0, atol=1e-6)


def test_places_are_listed_row_by_row():
    table = sincos_positions(torch.arange(3), torch.arange(5), 16)
    single = sincos_positions(torch.tensor([2]), torch.tensor([4]), 16)
    assert table.shape == (15, 16) and torch.equal(table[2 * 5 + 4], single[0])


@pytest.mark.parametrize("side", [1, 2, 4, 16])
def test_tables_equal_those_of_llava_mini(shared, side):
    golden = load_file(shared / "golden" / "llava_mini" / "sincos_pos_embed_dim32.safetensors")
    torch.testing.assert_close(square(side, 32), golden[f"output.grid{side}"], rtol=0, atol=1e-5)


def test_a_spread_place_has_the_mean_position_of_its_points():
    spread, centre = 1.5, 2.0
    points = torch.linspace(-8, 8, 2001) * spread + centre
    density = torch.exp(-0.5 * ((points - centre) / spread).square())
    table = sincos_positions(torch.zeros(1), points, 16)
    expected = (table * (density / density.sum()).unsqueeze(1)).sum(0)
    (position,) = sincos_positions(torch.zeros(1), torch.tensor([centre]), 16, spread=(0.0, spread))
    torch.testing.assert_close(position, expected, rtol=0, atol=1e-5)


def test_an_endless_spread_leaves_no_position():
    assert not sincos_positions(torch.arange(2), torch.arange(3), 16, spread=(math.inf, math.inf)).any()


def test_enlarging_to_the_same_grid_changes_no_bit():
    table = square(3, 16)
    assert enlarged_positions(table, 3, (3, 3)) is table


def test_one_place_enlarged_is_constant():
    enlarged = enlarged_positions(square(1, 16), 1, (3, 8))
    torch.testing.assert_close(enlarged, square(1, 16).expand(24, 16), rtol=0, atol=1e-6)


def test_enlarged_rows_stay_rows_on_a_grid_that_is_not_square():
    enlarged = enlarged_positions(square(4, 16), 4, (3, 8)).view(3, 8, 16)
    # columns in the first half, rows in the second
    assert (enlarged[:, :, :8] - enlarged[:1, :, :8]).abs().max() < 1e-6
    assert (enlarged[:, :, 8:] - enlarged[:, :1, 8:]).abs().max() < 1e-6
    assert (enlarged[0, 0] - enlarged[2, 7]).abs().max() > 0.1


def test_positions_are_exact_whatever_the_default_precision():
    expected = square(16, 32)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(square(16, 32), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_frequencies_fall_from_one():
    assert [wave_frequency(float(wave), 16) for wave in range(4)] == pytest.approx([1, 0.1, 0.01, 0.001])
