"""Plain controls with few tokens: the global view alone, average pooling, and folding of patches into channels.

Letters: B sub-images, P patches, K tokens, N patches per block, C vision width, D LLM width.
"""

import torch
from torch import Tensor, nn

from meteor.image.elastic import TokenCounts, side_of
from meteor.projector.checks import check_count
from meteor.projector.inputs import prepare_features
from meteor.projector.mlp import MLPProjector, two_layer_mlp
from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.pooling import pool_maps
from meteor.projector.tokenpacker import most_tokens, square_windows
from meteor.ssm.tensors import gather_rows


class GlobalView(MLPProjector):
    """LLaVA-1.5's MLP on the global view alone; the difference to `mlp` measures the benefit of slicing.

    The class has no code, because the token budget (`meteor.image.budget`) gives slices no tokens, and a sub-image without
    tokens is left out of the batch.
    """


class AvgPool(Projector):
    """Average of the map to grid x grid, then the two-layer MLP; 31,467,520 parameters at C = 1024, D = 5120.

    Studies of token compression find that this down-sampling beats many compressors on common benchmarks. A compressor is
    useful only if it beats this control at an equal number of tokens.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        grid: side of the pooled map in tokens; every sub-image, even a smaller map, becomes grid^2 tokens. Several numbers
            (`meteor.image.elastic`) let the map be pooled to another side in each call.

    Raises:
        SettingsError: ``grid`` is not a number of at least 1, a list of numbers or a range.
    """

    takes_k = True

    def __init__(self, vision_width: int, llm_width: int, *, grid: int | list[int] | dict[str, int] = 12) -> None:
        super().__init__()
        self.vision_width, self.grid = vision_width, TokenCounts.read("grid", grid).largest
        self.mlp = two_layer_mlp(vision_width, llm_width)

    def forward(
        self,
        features: Tensor,
        cls_attention: Tensor,
        grids: Tensor,
        native_weight: Tensor | None = None,
        k: int | None = None,
    ) -> ProjectorOutput:
        """Return tokens (B, grid^2 or k, D) in map order, all real; `Projector` describes the arguments."""
        dtype = next(self.parameters()).dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        grids = grids.to(mask_BP.device).long()
        side = self.grid if k is None else side_of(k)
        token_BKD = self.mlp(pool_maps(feature_BPC, grids, (side, side)))
        return ProjectorOutput(token_BKD, torch.ones(token_BKD.shape[:2], dtype=torch.bool, device=token_BKD.device))


class PixelShuffle(Projector):
    """Folding of s x s patches into a token of s^2 C channels (InternVL 1.5, arXiv 2404.16821).

    A block's channels are the channels of its patches, row by row. LayerNorm, Linear(s^2 C, D), GELU and Linear(D, D)
    follow: 47,204,352 parameters at C = 1024, D = 5120, s = 2. If s does not divide a side, patches beyond the map are
    zeros.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        scale_factor: side of a block in patches, s; Hu x Wu patches become ceil(Hu / s) x ceil(Wu / s) tokens.

    Raises:
        SettingsError: ``scale_factor`` is not an integer of at least 1.
    """

    def __init__(self, vision_width: int, llm_width: int, *, scale_factor: int = 2) -> None:
        super().__init__()
        check_count("scale_factor", scale_factor)
        self.vision_width, self.scale_factor = vision_width, scale_factor
        folded_width = scale_factor**2 * vision_width
        self.norm = nn.LayerNorm(folded_width)
        self.mlp = two_layer_mlp(folded_width, llm_width)

    def forward(
        self, features: Tensor, cls_attention: Tensor, grids: Tensor, native_weight: Tensor | None = None
    ) -> ProjectorOutput:
        """Return tokens (B, K, D) in map order; `Projector` describes the arguments."""
        dtype = next(self.parameters()).dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        folded_BKX, mask_BK = fold_blocks(feature_BPC, grids.to(mask_BP.device).long(), self.scale_factor)
        return ProjectorOutput(torch.where(mask_BK.unsqueeze(-1), self.mlp(self.norm(folded_BKX)), 0), mask_BK)


def fold_blocks(feature_BPC: Tensor, grids: Tensor, scale_factor: int) -> tuple[Tensor, Tensor]:
    """Fold each block of s x s patches into the channels of a single row (space to depth).

    Args:
        feature_BPC: patch features, (B, P, C), finite at padding.
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) long.
        scale_factor: side of a window in patches, s.

    Returns:
        Blocks, (B, K, s^2 C), zero beyond the map, and mask, (B, K) bool, True at blocks that hold a patch.
    """
    max_tokens = most_tokens(grids, feature_BPC.shape[1], scale_factor)
    window_BKN, seen_BKN = square_windows(grids, scale_factor, max_tokens)
    patch_BKNC = gather_rows(feature_BPC, window_BKN.flatten(1)).unflatten(1, window_BKN.shape[1:])
    return torch.where(seen_BKN.unsqueeze(-1), patch_BKNC, 0).flatten(2), seen_BKN[:, :, 0]
