"""Sine-cosine positions against the formula, and what tells places apart."""

import math

import pytest
import torch

from meteor.errors import SettingsError
from meteor.projector.positions import axis_positions, map_positions


def test_positions_of_one_axis_by_hand() -> None:
    # Width 4: two waves, of frequency 1 and 10000^(-1/2) = 0.01; sines first.
    expected = [[math.sin(x), math.sin(x / 100), math.cos(x), math.cos(x / 100)] for x in range(30)]
    torch.testing.assert_close(axis_positions(30, 4), torch.tensor(expected))


def test_the_first_half_tells_the_row_and_the_second_the_column() -> None:
    row, column = torch.tensor([[0, 2]]), torch.tensor([[3, 1]])
    position = map_positions(row, column, width=8, num_coordinates=4, dtype=torch.float64)
    axis = axis_positions(4, 4).double()
    assert position.dtype == torch.float64
    assert torch.equal(position, torch.cat([axis[[0, 2]], axis[[3, 1]]], dim=1).unsqueeze(0))


def test_a_width_that_cannot_hold_both_axes_is_refused() -> None:
    with pytest.raises(SettingsError, match="not 6"):
        map_positions(torch.tensor([0]), torch.tensor([0]), width=6, num_coordinates=1, dtype=torch.float32)
