"""Sine-cosine positions on a 2-D map, without learned parameters.

Letters: B sub-images, P places, N coordinates, X channels.
"""

import torch
from torch import Tensor

from meteor.errors import SettingsError

LONGEST_WAVE = 10_000.0


def axis_positions(num_coordinates: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the positions of coordinates 0 ... N - 1 on one axis: sines of all frequencies, then cosines.

    Frequency i of n is 10000^(-i / n) ("Attention Is All You Need", section 3.5) for any map size: coordinates count
    patches and are not scaled to the map.

    Args:
        num_coordinates: number of coordinates, N.
        width: number of channels, X, even.
        device: device of the result.

    Returns:
        Positions, (N, X) float32.
    """
    num_waves = width // 2
    exponent = torch.arange(num_waves, device=device, dtype=torch.float32) / num_waves
    coordinate_N1 = torch.arange(num_coordinates, device=device, dtype=torch.float32).unsqueeze(1)
    angle = coordinate_N1 * LONGEST_WAVE**-exponent
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def map_positions(row: Tensor, column: Tensor, *, width: int, num_coordinates: int, dtype: torch.dtype) -> Tensor:
    """Return the positions of places on a map: half of the channels encode the row, the other half the column.

    Args:
        row: row of each place, (..., P) long.
        column: column of each place, (..., P) long.
        width: number of channels, X, a multiple of 4.
        num_coordinates: number that exceeds every row and column. The caller knows it, so no value is read on the host.
        dtype: dtype of the result, which is computed in float32.

    Returns:
        Positions, (..., P, X).

    Raises:
        SettingsError: the width is not a multiple of 4.
    """
    if width % 4:
        raise SettingsError(f"2-D sine-cosine positions need a width that 4 divides, not {width}.")
    axis_NX = axis_positions(num_coordinates, width // 2, row.device).to(dtype)
    return torch.cat([axis_NX[row], axis_NX[column]], dim=-1)
