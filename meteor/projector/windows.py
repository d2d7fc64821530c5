"""Local summaries: one token for the window around each patch, on maps of different shapes in one batch.

Letters: B sub-images, P patches (the most of the batch), H and W rows and columns (the most of the batch), M = H W
cells of the padded map, X channels.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteor.ssm.tensors import accumulation_dtype, gather_rows


@dataclass(frozen=True)
class PatchMaps:
    """Where patches lie on a padded map (H, W), and back.

    Attributes:
        height: H, the most rows of the batch.
        width: W, the most columns of the batch.
        patch_of_cell: (B, M) long, the patch in each cell; 0 outside a sub-image's own map.
        in_map: (B, M) bool, True inside it.
        cell_of_patch: (B, P) long, the cell of each patch; 0 at padding.
    """

    height: int
    width: int
    patch_of_cell: Tensor
    in_map: Tensor
    cell_of_patch: Tensor

    @classmethod
    def of(cls, grids: Tensor, mask_BP: Tensor) -> "PatchMaps":
        """Lay out the maps of a batch.

        Args:
            grids: (B, 2) integer, (Hu, Wu) of each sub-image, read on the host.
            mask_BP: (B, P) bool, True at real patches.
        """
        shapes = grids.tolist()
        height = max([1, *(rows for rows, _ in shapes)])
        width = max([1, *(columns for _, columns in shapes)])
        device = mask_BP.device
        rows_B1, columns_B1 = grids.to(device).long().split(1, dim=1)
        cell_M = torch.arange(height * width, device=device)
        row_M, column_M = cell_M // width, cell_M % width
        in_map_BM = (row_M < rows_B1) & (column_M < columns_B1)
        patch_BM = torch.where(in_map_BM, row_M * columns_B1 + column_M, 0)
        patch_P = torch.arange(mask_BP.shape[1], device=device)
        cell_BP = patch_P // columns_B1 * width + patch_P % columns_B1
        return cls(height, width, patch_BM, in_map_BM, torch.where(mask_BP, cell_BP, 0))

    def spread(self, token_BPX: Tensor) -> Tensor:
        """Lay tokens (B, P, X) on the map (B, X, H, W), zero outside each sub-image's own map."""
        cell_BMX = gather_rows(token_BPX, self.patch_of_cell)
        cell_BMX = torch.where(self.in_map.unsqueeze(-1), cell_BMX, 0)
        return cell_BMX.unflatten(1, (self.height, self.width)).permute(0, 3, 1, 2)

    def collect(self, map_BXHW: Tensor) -> Tensor:
        """Read the tokens (B, P, X) back; rows of padding are meaningless and finite."""
        return gather_rows(map_BXHW.permute(0, 2, 3, 1).flatten(1, 2), self.cell_of_patch)


class WindowMean(nn.Module):
    """Mean of the tokens in a window; at the border only the tokens inside the map count. No parameters.

    Args:
        window: odd side of the window.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(self, token_BPX: Tensor, maps: PatchMaps) -> Tensor:
        """Summarise (B, P, X) to (B, P, X), accumulating in float32."""
        dtype = accumulation_dtype(token_BPX.dtype)
        in_map_B1HW = maps.in_map.unflatten(1, (maps.height, maps.width)).unsqueeze(1)
        # Cells far outside a small map of the batch have no tokens in their window, and are never read.
        num_tokens_B1HW = self._window_sum(in_map_B1HW.to(dtype)).clamp(min=1)
        mean_BXHW = self._window_sum(maps.spread(token_BPX.to(dtype))) / num_tokens_B1HW
        return maps.collect(mean_BXHW).to(token_BPX.dtype)

    def _window_sum(self, map_BXHW: Tensor) -> Tensor:
        return F.avg_pool2d(map_BXHW, self.window, stride=1, padding=self.window // 2, divisor_override=1)


class WindowConv(nn.Module):
    """Depth-wise convolution over the window, zeros outside the map; it starts as the mean of a full window.

    Args:
        width: X.
        window: odd side of the window.
    """

    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, window, padding=window // 2, groups=width, bias=False)
        nn.init.constant_(self.conv.weight, 1 / window**2)

    def forward(self, token_BPX: Tensor, maps: PatchMaps) -> Tensor:
        """Summarise (B, P, X) to (B, P, X)."""
        return maps.collect(self.conv(maps.spread(token_BPX)))
