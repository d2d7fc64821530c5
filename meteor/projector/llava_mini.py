"""LLaVA-Mini's compressor, in which a few learned queries attend to the whole map.

Letters: B sub-images, P patches, K queries, C vision width, D LLM width.
"""

import torch
from torch import Tensor, nn

from meteor.image.elastic import TokenCounts, side_of
from meteor.projector.inputs import prepare_features
from meteor.projector.mlp import two_layer_mlp
from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.positions import map_positions
from meteor.projector.query_grid import INIT_STD, GridAttention, most_heads

MOST_HEADS = 8


class LLaVAMini(Projector):
    """Compressor of LLaVA-Mini (arXiv 2501.03895): each sub-image becomes grid^2 tokens, by default a single token.

    Queries with sine-cosine positions attend to all patches, with 8 heads or the largest number below 8 that divides C. Keys
    have positions too, values have none. The two-layer MLP follows. The projector has 35,666,944 parameters at C = 1024,
    D = 5120 and one query, the published 35.67 M.

    **Compressor only.** Before compression the original fuses visual tokens into the text, in four more layers of the
    language model's shape. They are not part of a projector, so results of this projector are not results of LLaVA-Mini.

    **Our choice**: query (r, c) has the position of the middle of its cell of the map, rounded down to a patch.

    Args:
        vision_width: width of the features, C, a multiple of 4.
        llm_width: width of the LLM's embeddings, D.
        grid: side of the square grid of queries. With several numbers (`meteor.image.elastic`) a call with k tokens uses the
            first k queries, placed as a grid of their own over the whole map.

    Raises:
        SettingsError: ``grid`` is not a number of at least 1, a list of numbers or a range, or C is not a multiple of 4.
    """

    takes_k = True

    def __init__(self, vision_width: int, llm_width: int, *, grid: int | list[int] | dict[str, int] = 1) -> None:
        super().__init__()
        self.vision_width, self.grid = vision_width, TokenCounts.read("grid", grid).largest
        self.queries = nn.Parameter(INIT_STD * torch.randn(self.grid**2, vision_width))
        self.attention = GridAttention(vision_width, most_heads(vision_width, MOST_HEADS))
        self.mlp = two_layer_mlp(vision_width, llm_width)
        # A width that positions cannot have is refused here, at construction, and not in the first forward pass.
        map_positions(
            torch.zeros(1).long(), torch.zeros(1).long(), width=vision_width, num_coordinates=1, dtype=torch.float
        )

    def forward(
        self,
        features: Tensor,
        cls_attention: Tensor,
        grids: Tensor,
        native_weight: Tensor | None = None,
        k: int | None = None,
    ) -> ProjectorOutput:
        """Return tokens (B, grid^2 or k, D) in the queries' order, all real; `Projector` describes the arguments."""
        dtype = self.queries.dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        grids, max_patches = grids.to(mask_BP.device).long(), mask_BP.shape[1]
        side = self.grid if k is None else side_of(k)
        if side > self.grid:
            raise ValueError(f"k is {k}; this projector has {self.grid**2} queries")
        rows_B1, columns_B1 = grids.split(1, dim=1)
        patch_P, query_K = (torch.arange(count, device=mask_BP.device) for count in (max_patches, side**2))

        def positions(row: Tensor, column: Tensor) -> Tensor:
            return map_positions(row, column, width=self.vision_width, num_coordinates=max(max_patches, 1), dtype=dtype)

        key_BPC = feature_BPC + positions(patch_P // columns_B1, patch_P % columns_B1)
        query_row_BK = _middle(query_K // side, rows_B1, side)
        query_BKC = self.queries[: side**2] + positions(query_row_BK, _middle(query_K % side, columns_B1, side))
        seen_BKP = mask_BP.unsqueeze(1).expand(-1, side**2, -1)
        token_BKD = self.mlp(self.attention(query_BKC, key_BPC, feature_BPC, seen_BKP))
        return ProjectorOutput(token_BKD, torch.ones(token_BKD.shape[:2], dtype=torch.bool, device=token_BKD.device))


def _middle(cell_K: Tensor, length_B1: Tensor, num_cells: int) -> Tensor:
    """Return the patch in the middle of each cell on an axis, rounded down, (B, K)."""
    return (2 * cell_K + 1) * length_B1 // (2 * num_cells)
