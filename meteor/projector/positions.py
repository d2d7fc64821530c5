"""Sine-cosine positions of places on a 2-D map; nothing is learned.

Letters: B sub-images, P places, N coordinates, X channels.
"""

import torch
from torch import Tensor

from meteor.errors import SettingsError

LONGEST_WAVE = 10_000.0


def axis_positions(num_coordinates: int, width: int, device: torch.device | None = None) -> Tensor:
    """Positions of the coordinates 0 ... N - 1 of one axis: the sines of all frequencies, then their cosines.

    Frequency i of n is 10000^(-i / n) ("Attention Is All You Need", section 3.5), for any map size: coordinates count
    patches, they are not scaled to the map.

    Args:
        num_coordinates: N.
        width: X, even.
        device: of the result.

    Returns:
        (N, X) float32.
    """
    num_waves = width // 2
    exponent = torch.arange(num_waves, device=device, dtype=torch.float32) / num_waves
    coordinate_N1 = torch.arange(num_coordinates, device=device, dtype=torch.float32).unsqueeze(1)
    angle = coordinate_N1 * LONGEST_WAVE**-exponent
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def map_positions(row: Tensor, column: Tensor, *, width: int, num_coordinates: int, dtype: torch.dtype) -> Tensor:
    """Positions of places on a map: the first half of the channels tells the row, the second half the column.

    Args:
        row: (..., P) long.
        column: (..., P) long.
        width: X, a multiple of 4.
        num_coordinates: above every row and column; known on the host, so that none of their values is read.
        dtype: of the result; computed in float32.

    Returns:
        (..., P, X).

    Raises:
        SettingsError: the width is no multiple of 4.
    """
    if width % 4:
        raise SettingsError(f"2-D sine-cosine positions need a width that 4 divides, not {width}.")
    axis_NX = axis_positions(num_coordinates, width // 2, row.device).to(dtype)
    return torch.cat([axis_NX[row], axis_NX[column]], dim=-1)
