"""LLaVA-UHD's projector: a grid of learned queries, an attention at the LLM's width, and a projection.

Letters: B sub-images, P patches, K queries, C vision width, D LLM width.
"""

from typing import Self

import torch
from torch import Tensor, nn

from meteor.image.elastic import TokenCounts
from meteor.projector.inputs import prepare_features
from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.positions import map_positions
from meteor.projector.query_grid import (
    INIT_STD,
    GridAttention,
    init_linear,
    most_heads,
    most_square_grid,
    pooling_windows,
)

HEAD_WIDTH = 128


class Resampler(Projector):
    """Resampler that turns each sub-image into k tokens (LLaVA-UHD, arXiv 2403.11703, section 3.3).

    Queries form a grid of k = rows x columns, as square as possible: 12 x 12, 8 x 8, and 4 x 8 for 32. Keys and values are
    Linear(C, D) and LayerNorm of the features. Positions are added to normalised queries and keys, not to values: a query
    has its place on the grid of queries, a key its row and column on its map. There is no residual connection: tokens are
    LayerNorm(attention) times a D x D matrix.

    **Our choice**: query (r, c) sees the window of adaptive average pooling (`pooling_windows`). There are D / 128 heads, or
    the largest smaller number that divides D. The projector has 137,840,640 parameters at C = 1024, D = 5120, k = 144. The
    published 137.84 M count the frozen position table too.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D, a multiple of 4.
        k: number of tokens per sub-image. With a list of numbers (`meteor.image.elastic`) a call with k tokens uses the first
            k queries, placed as a grid of their own over the whole map: their windows and positions are those of a
            projector built with k. A prefix of the large grid would see only the top of the map.

    Raises:
        SettingsError: ``k`` is not a number of at least 1 or a list of numbers, or D is not a multiple of 4.
    """

    takes_k = True

    def __init__(self, vision_width: int, llm_width: int, *, k: int | list[int] = 144) -> None:
        super().__init__()
        largest = TokenCounts.read("k", k).largest
        self.vision_width = vision_width
        self.queries = nn.Parameter(INIT_STD * torch.randn(largest, llm_width))
        position_KD = _query_positions(largest, llm_width, torch.get_default_dtype())
        self.positions = nn.Parameter(position_KD, requires_grad=False)
        self.to_keys = init_linear(nn.Linear(vision_width, llm_width, bias=False))
        self.query_norm = nn.LayerNorm(llm_width)
        self.key_norm = nn.LayerNorm(llm_width)
        self.attention = GridAttention(llm_width, most_heads(llm_width, llm_width // HEAD_WIDTH))
        self.output_norm = nn.LayerNorm(llm_width)
        self.projection = nn.Parameter(llm_width**-0.5 * torch.randn(llm_width, llm_width))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or unfreeze all parameters but the position table, which stays frozen."""
        super().requires_grad_(requires_grad)
        self.positions.requires_grad_(False)
        return self

    def forward(
        self,
        features: Tensor,
        cls_attention: Tensor,
        grids: Tensor,
        native_weight: Tensor | None = None,
        k: int | None = None,
    ) -> ProjectorOutput:
        """Compress a batch of sub-images, each by itself. B may be 0, and then P too.

        Args:
            features: patch features, (B, P, C), any floating dtype; padding may hold anything.
            cls_attention: attention of the class token over patches, (B, P); unused.
            grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer.
            native_weight: weight of the native expert; unused.
            k: number of tokens per sub-image; the largest number of training if None.

        Returns:
            Tokens, (B, k, D), in the weights' dtype, all real, without indices, scores or auxiliary loss.

        Raises:
            ValueError: a shape is wrong, a grid does not fit P, or there are fewer than k queries.
        """
        dtype = self.queries.dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        num_sub_images, max_patches = mask_BP.shape
        num_queries = len(self.queries)
        k = num_queries if k is None else k
        if k > num_queries:
            raise ValueError(f"k is {k}; this projector has {num_queries} queries")
        grids = grids.to(mask_BP.device).long()
        value_BPD = self.key_norm(self.to_keys(feature_BPC))
        key_BPD = value_BPD + self._key_positions(grids, max_patches, dtype)
        # transformers' from_pretrained makes every parameter trainable, so the frozen table is detached here too.
        position_KD = self.positions.detach()
        if k < num_queries:
            position_KD = _query_positions(k, position_KD.shape[1], dtype, position_KD.device)
        query_KD = self.query_norm(self.queries)[:k] + position_KD
        attended_BKD = self.attention(
            query_KD.expand(num_sub_images, -1, -1),
            key_BPD,
            value_BPD,
            pooling_windows(grids, most_square_grid(k), max_patches),
        )
        token_BKD = self.output_norm(attended_BKD) @ self.projection
        return ProjectorOutput(
            tokens=token_BKD, mask=torch.ones(token_BKD.shape[:2], dtype=torch.bool, device=token_BKD.device)
        )

    def _key_positions(self, grids: Tensor, max_patches: int, dtype: torch.dtype) -> Tensor:
        """Return the position of each patch on the map of its sub-image, (B, P, D)."""
        patch_P = torch.arange(max_patches, device=grids.device)
        columns_B1 = grids[:, 1:]
        return map_positions(
            patch_P // columns_B1,
            patch_P % columns_B1,
            width=self.projection.shape[0],
            num_coordinates=max_patches,
            dtype=dtype,
        )


def _query_positions(k: int, width: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return the position of each of k queries on their own grid, (K, D)."""
    rows, columns = most_square_grid(k)
    query_K = torch.arange(k, device=device)
    return map_positions(
        query_K // columns, query_K % columns, width=width, num_coordinates=max(rows, columns), dtype=dtype
    )
