"""TokenPacker, single-layer variant: a down-sampled map whose tokens gather detail from their windows.

Letters: B sub-images, P patches, K queries, N patches per window, C vision width, D LLM width.
"""

import torch
from torch import Tensor, nn

from meteor.projector.checks import check_count
from meteor.projector.inputs import prepare_features
from meteor.projector.mlp import two_layer_mlp
from meteor.projector.output import Projector, ProjectorOutput
from meteor.projector.query_grid import GridAttention, init_linear, most_heads
from meteor.ssm.tensors import accumulation_dtype, gather_rows

MOST_HEADS = 8


class TokenPacker(Projector):
    """Local attention that turns Hu x Wu patches into ceil(Hu / s) x ceil(Wu / s) tokens (arXiv 2407.02392, section 3.2).

    The bilinearly down-sampled map gives the queries. Each query attends to its s x s window of keys and values, and the
    result goes through the two-layer MLP, without residual connection. Queries pass a Linear layer without bias; keys and
    values pass separate two-layer MLPs (Linear, GELU, Linear, with bias). A LayerNorm follows each. The attention has 8
    heads, or the largest number below 8 that divides C. All this has width C.

    **Single-layer variant.** The original takes keys and values from four CLIP blocks (12, 16, 22, 23), concatenated to
    width 4C before the MLPs: 47,210,496 parameters at C = 1024, D = 5120. The cache holds a single block, so keys and values
    come from the features of the queries: 40,919,040 parameters, and no finer detail from shallow blocks. Results of this
    projector are not results of the original.

    **Our choice** if s does not divide a side: the last window of the row or column holds fewer patches. The down-sampled
    map is stretched over the whole side, as `torch.nn.functional.interpolate` with a size does.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        scale_factor: side of a window in patches, s; 24 x 24 patches become (24 / s)^2 tokens.

    Raises:
        SettingsError: ``scale_factor`` is not an integer of at least 1.
    """

    def __init__(self, vision_width: int, llm_width: int, *, scale_factor: int = 2) -> None:
        super().__init__()
        check_count("scale_factor", scale_factor)
        self.vision_width = vision_width
        self.scale_factor = scale_factor
        self.to_queries = nn.Sequential(
            init_linear(nn.Linear(vision_width, vision_width, bias=False)), nn.LayerNorm(vision_width)
        )
        self.to_keys, self.to_values = (
            nn.Sequential(
                init_linear(nn.Linear(vision_width, vision_width)),
                nn.GELU(),
                init_linear(nn.Linear(vision_width, vision_width)),
                nn.LayerNorm(vision_width),
            )
            for _ in range(2)
        )
        self.attention = GridAttention(vision_width, most_heads(vision_width, MOST_HEADS))
        self.mlp = two_layer_mlp(vision_width, llm_width)

    def forward(
        self, features: Tensor, cls_attention: Tensor, grids: Tensor, native_weight: Tensor | None = None
    ) -> ProjectorOutput:
        """Compress a batch of sub-images, each by itself. B may be 0, and then P too.

        Args:
            features: patch features, (B, P, C), any floating dtype; padding may hold anything.
            cls_attention: attention of the class token over patches, (B, P); unused.
            grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer.
            native_weight: weight of the native expert; unused.

        Returns:
            Tokens, (B, K, D), in the weights' dtype and in map order, without indices, scores or auxiliary loss. The first
            ceil(Hu / s) ceil(Wu / s) tokens of each sub-image are real. K is the largest number of real tokens in the batch;
            in a compiled graph, and for B = 0, it is ceil(P / s).

        Raises:
            ValueError: a shape is wrong, or a grid does not fit P.
        """
        dtype = next(self.parameters()).dtype
        feature_BPC, mask_BP = prepare_features(
            features, cls_attention, grids, vision_width=self.vision_width, dtype=dtype
        )
        grids = grids.to(mask_BP.device).long()
        max_tokens = most_tokens(grids, mask_BP.shape[1], self.scale_factor)
        query_BKC = self.to_queries(down_sample(feature_BPC, grids, self.scale_factor, max_tokens))
        window_BKN, seen_BKN = square_windows(grids, self.scale_factor, max_tokens)
        attended_BKC = self.attention.over_windows(
            query_BKC, self.to_keys(feature_BPC), self.to_values(feature_BPC), window_BKN, seen_BKN
        )
        # A window that touches the map has its first patch on the map.
        mask_BK = seen_BKN[:, :, 0]
        return ProjectorOutput(tokens=torch.where(mask_BK.unsqueeze(-1), self.mlp(attended_BKC), 0), mask=mask_BK)


def most_tokens(grids: Tensor, max_patches: int, scale_factor: int) -> int:
    """Return K of a batch, read on the host; a compiled graph, which cannot read values, uses the larger bound."""
    if torch.compiler.is_compiling() or not grids.shape[0]:
        return token_bound(max_patches, scale_factor)
    return int((-(-grids // scale_factor)).prod(dim=1).max())


def token_bound(max_patches: int, scale_factor: int) -> int:
    """Return K = ceil(P / s), which bounds the tokens of any map of at most P patches, whatever its shape.

    A map of a x b tokens has at least (s (a - 1) + 1) (s (b - 1) + 1) patches. This product is at least
    s ((a - 1) (b - 1) + (a - 1) + (b - 1)) + 1 = s (a b - 1) + 1, hence a b <= ceil(Hu Wu / s). A strip one patch wide
    reaches the bound, so no smaller bound holds without reading the grids.
    """
    return -(-max_patches // scale_factor)


def square_windows(grids: Tensor, scale_factor: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the s x s window of patches of each token.

    Args:
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) long.
        scale_factor: side of a window in patches, s.
        max_tokens: number of token slots per sub-image, K.

    Returns:
        Patches of each window, (B, K, N) long, N = s^2, row by row, 0 beyond the map; and a mask, (B, K, N) bool, True at
        patches on the map.
    """
    row_BK1, column_BK1 = (place.unsqueeze(-1) for place in _token_places(grids, scale_factor, max_tokens))
    inside_N = torch.arange(scale_factor**2, device=grids.device)
    row_BKN = row_BK1 * scale_factor + inside_N // scale_factor
    column_BKN = column_BK1 * scale_factor + inside_N % scale_factor
    rows_B11, columns_B11 = grids[:, :1, None], grids[:, 1:, None]
    seen_BKN = (row_BKN < rows_B11) & (column_BKN < columns_B11)
    return torch.where(seen_BKN, row_BKN * columns_B11 + column_BKN, 0), seen_BKN


def down_sample(feature_BPC: Tensor, grids: Tensor, scale_factor: int, max_tokens: int) -> Tensor:
    """Down-sample each map bilinearly to ceil(Hu / s) x ceil(Wu / s), without anti-aliasing or aligned corners.

    Args:
        feature_BPC: patch features, (B, P, C).
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) long.
        scale_factor: side of a window in patches, s.
        max_tokens: number of token slots per sub-image, K.

    Returns:
        Down-sampled maps, (B, K, C), in the features' dtype, computed in at least float32; empty slots are finite.
    """
    dtype = accumulation_dtype(feature_BPC.dtype)
    rows_B1, columns_B1 = grids.split(1, dim=1)
    row_BK, column_BK = _token_places(grids, scale_factor, max_tokens)
    rows = _neighbours(row_BK, rows_B1, scale_factor, dtype)
    columns = _neighbours(column_BK, columns_B1, scale_factor, dtype)
    sampled_BKC = torch.zeros((), dtype=dtype, device=feature_BPC.device)
    for near_row_BK, row_weight_BK in rows:
        for near_column_BK, column_weight_BK in columns:
            corner_BKC = gather_rows(feature_BPC, near_row_BK * columns_B1 + near_column_BK)
            sampled_BKC = sampled_BKC + (row_weight_BK * column_weight_BK).unsqueeze(-1) * corner_BKC.to(dtype)
    return sampled_BKC.to(feature_BPC.dtype)


def _token_places(grids: Tensor, scale_factor: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """Return row and column of each token on the down-sampled map, both (B, K); empty slots have rows beyond the map."""
    token_K = torch.arange(max_tokens, device=grids.device)
    token_columns_B1 = -(-grids[:, 1:] // scale_factor)
    return token_K // token_columns_B1, token_K % token_columns_B1


def _neighbours(
    place_BK: Tensor, length_B1: Tensor, scale_factor: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the two patches on an axis around each token's centre, with weights, all (B, K)."""
    num_tokens_B1 = -(-length_B1 // scale_factor)
    # The centre is (place + 1/2) length / tokens - 1/2. Whole numbers hold it, so that no rounding moves a patch.
    centre_BK = (2 * place_BK + 1) * length_B1 - num_tokens_B1
    lower_BK = (centre_BK // (2 * num_tokens_B1)).minimum(length_B1 - 1)
    upper_BK = (lower_BK + 1).minimum(length_B1 - 1)
    upper_weight_BK = (centre_BK % (2 * num_tokens_B1)).to(dtype) / (2 * num_tokens_B1)
    return (lower_BK, 1 - upper_weight_BK), (upper_BK, upper_weight_BK)
