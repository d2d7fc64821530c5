"""Local summaries (TL): a token for the window around each patch, for maps of different shapes in one batch.

Nothing is read on the host: index arithmetic on row-major patches reaches the rows and columns of each map.

Letters: B sub-images, P patches (largest number in the batch), X channels, w side of the window.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from meteor.ssm.tensors import accumulation_dtype, gather_rows


class PatchMaps(NamedTuple):
    """Shapes of a batch's maps: patch p of a sub-image is in row p // num_columns and column p % num_columns.

    Attributes:
        num_rows: rows Hu of each map, (B, 1) long.
        num_columns: columns Wu of each map, (B, 1) long.
        patch: patch numbers 0 ... P - 1, (P,) long.
    """

    num_rows: Tensor
    num_columns: Tensor
    patch: Tensor

    @classmethod
    def of(cls, grids: Tensor, max_patches: int, device: torch.device) -> "PatchMaps":
        """Build the maps of sub-images from patch grids (Hu, Wu), (B, 2) integer, each of at most ``max_patches``."""
        num_rows_B1, num_columns_B1 = grids.to(device).long().split(1, dim=1)
        return cls(num_rows_B1, num_columns_B1, torch.arange(max_patches, device=device))

    def up_or_down(self, token_BPX: Tensor, num_rows: int) -> Tensor:
        """Return the token ``num_rows`` below each patch (above if negative), 0 outside the map, (B, P, X)."""
        if num_rows == 0:
            return token_BPX
        row_BP = self.patch // self.num_columns + num_rows
        inside_BP = (row_BP >= 0) & (row_BP < self.num_rows)
        index_BP = torch.where(inside_BP, self.patch + num_rows * self.num_columns, 0)
        return gather_rows(token_BPX, index_BP) * inside_BP.unsqueeze(-1)

    def sideways(self, token_BPX: Tensor, num_columns: int) -> Tensor:
        """Return the token ``num_columns`` right of each patch (left if negative), 0 outside the map, (B, P, X)."""
        if num_columns == 0:
            return token_BPX
        column_BP = self.patch % self.num_columns + num_columns
        inside_BP = (column_BP >= 0) & (column_BP < self.num_columns)
        return token_BPX.roll(-num_columns, dims=1) * inside_BP.unsqueeze(-1)

    def num_in_window(self, window: int) -> Tensor:
        """Count the map's patches in the window around each patch, (B, P) long, at least 1; meaningless at padding."""
        half = window // 2
        places = (
            (self.patch // self.num_columns, self.num_rows),
            (self.patch % self.num_columns, self.num_columns),
        )
        rows_BP, columns_BP = (
            torch.minimum(place + half, size - 1) - (place - half).clamp(min=0) + 1 for place, size in places
        )
        return (rows_BP * columns_BP).clamp(min=1)


class WindowMean(nn.Module):
    """Mean of the tokens in a window, without parameters; at the border only tokens inside the map count.

    Args:
        window: odd side of the window in patches.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, token_BPX: Tensor, maps: PatchMaps) -> Tensor:
        """Average tokens (B, P, X) to (B, P, X), accumulated in float32; rows of padding are meaningless but finite."""
        steps = _steps(self.window)
        sum_BPX = token_BPX.to(accumulation_dtype(token_BPX.dtype))
        # The sum along rows, then along columns, needs 2 w passes instead of w^2.
        for shift in (maps.sideways, maps.up_or_down):
            sum_BPX = sum((shift(sum_BPX, step) for step in steps if step), start=sum_BPX)
        return (sum_BPX / maps.num_in_window(self.window).unsqueeze(-1)).to(token_BPX.dtype)


class WindowConv(nn.Module):
    """Depth-wise convolution over a window with zeros outside the map; its initial weight is a full window's mean.

    Args:
        width: number of channels, X.
        window: odd side of the window in patches.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.weight = nn.Parameter(torch.full((width, window, window), 1 / window**2))

    def forward(self, token_BPX: Tensor, maps: PatchMaps) -> Tensor:
        """Convolve tokens (B, P, X) to (B, P, X), accumulated in float32; rows of padding are meaningless but finite."""
        dtype = accumulation_dtype(token_BPX.dtype)
        steps = _steps(self.window)
        result_BPX = torch.zeros_like(token_BPX, dtype=dtype)
        for down, weight_Xw in zip(steps, self.weight.to(dtype).unbind(1), strict=True):
            row_BPX = maps.up_or_down(token_BPX.to(dtype), down)
            for right, weight_X in zip(steps, weight_Xw.unbind(1), strict=True):
                result_BPX = result_BPX + maps.sideways(row_BPX, right) * weight_X
        return result_BPX.to(token_BPX.dtype)


def _steps(window: int) -> range:
    return range(-(window // 2), window // 2 + 1)
