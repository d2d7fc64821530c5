"""Honeybee's C-Abstractor: convolutions before and after pooling, so that tokens keep local context.

Letters: B sub-images, P patches, K tokens, N places of the position table, C vision width, D LLM width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteor.projector.checks import check_count
from meteor.projector.inputs import prepare_features
from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.pooling import pool_maps
from meteor.projector.query_grid import INIT_STD
from meteor.ssm.tensors import accumulation_dtype, gather_rows
from meteor.ssm.windows import PatchMaps, WindowConv

TABLE_SIDE = 24
DEPTH = 3


class CAbstractor(Projector):
    """Convolutional projector that turns each sub-image into grid^2 tokens (Honeybee, arXiv 2312.06742).

    A learned position table is added to the features. Three residual blocks follow, an average over the map to grid x grid,
    three more blocks, and Linear, SiLU, Linear. The blocks are RegNet's: 1 x 1, depth-wise 3 x 3 and 1 x 1 convolutions
    without bias, each with a LayerNorm over channels and SiLU; squeeze and excitation of C / 4 precede the last. The
    projector has 47,885,824 parameters at C = 1024, D = 5120, the published 47.89 M.

    **Our choice**: the table is made for 24 x 24 maps and bilinearly interpolated for others, as CLIP's positions are.
    Convolutions see zeros outside the map, and the squeeze is a mean over real patches.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        grid: side of the pooled map in tokens.

    Raises:
        SettingsError: ``grid`` is not an integer of at least 1.
    """

    def __init__(self, vision_width: int, llm_width: int, *, grid: int = 12) -> None:
        super().__init__()
        check_count("grid", grid)
        self.vision_width, self.grid = vision_width, grid
        self.positions = nn.Parameter(INIT_STD * torch.randn(TABLE_SIDE**2, vision_width))
        self.before = nn.ModuleList(RegBlock(vision_width) for _ in range(DEPTH))
        self.after = nn.ModuleList(RegBlock(vision_width) for _ in range(DEPTH))
        self.readout = nn.Sequential(nn.Linear(vision_width, llm_width), nn.SiLU(), nn.Linear(llm_width, llm_width))

    def forward(
        self, features: Tensor, cls_attention: Tensor, grids: Tensor, native_weight: Tensor | None = None
    ) -> ProjectorOutput:
        """Return tokens (B, grid^2, D) in map order, all real; `Projector` describes the arguments."""
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=self.positions.dtype
        )
        grids, maps = grids.to(mask_BP.device).long(), PatchMaps.of(grids, mask_BP.shape[1], mask_BP.device)
        hidden_BPC = feature_BPC + interpolate_table(self.positions, grids, mask_BP.shape[1])
        for block in self.before:
            hidden_BPC = block(hidden_BPC, maps, mask_BP)
        pooled_grid = (self.grid, self.grid)
        pooled_BKC = pool_maps(hidden_BPC, grids, pooled_grid)
        mask_BK = torch.ones(pooled_BKC.shape[:2], dtype=torch.bool, device=mask_BP.device)
        pooled_maps = PatchMaps.of(torch.full_like(grids, self.grid), self.grid**2, mask_BP.device)
        for block in self.after:
            pooled_BKC = block(pooled_BKC, pooled_maps, mask_BK)
        return ProjectorOutput(self.readout(pooled_BKC), mask_BK)


class RegBlock(nn.Module):
    """RegNet's residual block (arXiv 2003.13678) on maps of different shapes, with LayerNorm instead of BatchNorm.

    Args:
        width: number of channels, C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        squeezed = max(width // 4, 1)
        self.enter, self.leave = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.neighbours = WindowConv(width, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.squeeze, self.excite = nn.Linear(width, squeezed), nn.Linear(squeezed, width)

    def forward(self, token_BPC: Tensor, maps: PatchMaps, mask_BP: Tensor) -> Tensor:
        """Transform tokens (B, P, C) to (B, P, C); rows of padding become zero."""
        entry_norm, neighbour_norm, exit_norm = self.norms
        hidden_BPC = F.silu(entry_norm(self.enter(token_BPC)))
        hidden_BPC = F.silu(neighbour_norm(self.neighbours(hidden_BPC, maps)))
        hidden_BPC = hidden_BPC * self._gate(hidden_BPC, mask_BP)
        added_BPC = F.silu(exit_norm(self.leave(hidden_BPC)) + token_BPC)
        return torch.where(mask_BP.unsqueeze(-1), added_BPC, 0)

    def _gate(self, hidden_BPC: Tensor, mask_BP: Tensor) -> Tensor:
        """Return the excitation of each channel, (B, 1, C), between 0 and 1."""
        dtype = accumulation_dtype(hidden_BPC.dtype)
        total_B1C = torch.where(mask_BP.unsqueeze(-1), hidden_BPC.to(dtype), 0).sum(dim=1, keepdim=True)
        mean_B1C = total_B1C / mask_BP.sum(dim=1).clamp(min=1)[:, None, None]
        return self.excite(F.silu(self.squeeze(mean_B1C.to(hidden_BPC.dtype)))).sigmoid()


def interpolate_table(table_NC: Tensor, grids: Tensor, max_patches: int) -> Tensor:
    """Interpolate a square table of positions bilinearly to maps of other shapes, with corners not aligned.

    Args:
        table_NC: table of positions, (N, C), row-major, N = side^2.
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) long.
        max_patches: padded number of patches, P.

    Returns:
        The position of each patch, (B, P, C); finite at padding.
    """
    side = round(table_NC.shape[0] ** 0.5)
    patch_P = torch.arange(max_patches, device=grids.device)
    rows_B1, columns_B1 = grids.split(1, dim=1)
    dtype = accumulation_dtype(table_NC.dtype)
    rows = _neighbours(patch_P // columns_B1, rows_B1, side, dtype)
    columns = _neighbours(patch_P % columns_B1, columns_B1, side, dtype)
    table_1NC = table_NC.to(dtype).unsqueeze(0).expand(grids.shape[0], -1, -1)
    result_BPC = torch.zeros((), dtype=dtype, device=grids.device)
    for row_BP, row_weight_BP in rows:
        for column_BP, column_weight_BP in columns:
            corner_BPC = gather_rows(table_1NC, row_BP * side + column_BP)
            result_BPC = result_BPC + (row_weight_BP * column_weight_BP).unsqueeze(-1) * corner_BPC
    return result_BPC.to(table_NC.dtype)


def _neighbours(
    place_BP: Tensor, length_B1: Tensor, side: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the two places on the table's axis around each place on the map's axis, with weights, all (B, P)."""
    # Centres of cells, as in torch's interpolate with align_corners=False.
    centre_BP = (((2 * place_BP + 1) * side).to(dtype) / (2 * length_B1) - 0.5).clamp(0, side - 1)
    lower_BP = centre_BP.floor().long().clamp(max=max(side - 2, 0))
    upper_weight_BP = centre_BP - lower_BP
    return (lower_BP, 1 - upper_weight_BP), ((lower_BP + 1).clamp(max=side - 1), upper_weight_BP)
