"""TokenPacker, single-layer variant: a down-sampled map, each of whose tokens takes up detail from its own window.

Letters: B sub-images, P patches, K queries, N patches of a window, C vision width, D LLM width.
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
    """A map of Hu x Wu patches becomes ceil(Hu / s) x ceil(Wu / s) tokens (TokenPacker, arXiv 2407.02392, section 3.2).

    Queries are the map, bilinearly down-sampled; each attends to the s x s window of keys and values it stands for, and
    what it gathers goes through the two-layer MLP, without residual connection. Queries pass a Linear without bias,
    keys and values a two-layer MLP of their own (Linear, GELU, Linear, with bias), each followed by LayerNorm; then an
    attention of 8 heads (the largest number up to 8 that divides C), all at width C.

    **Single-layer variant.** The original takes keys and values from four CLIP blocks (12, 16, 22, 23), whose
    concatenation enters their MLPs at width 4C: 47,210,496 parameters at C = 1024, D = 5120. The cache holds one block,
    so here they come from the same features as the queries: 40,919,040 parameters, and no finer detail from shallow
    blocks. A result of this projector is not a result of the original.

    **Our choice** where s does not divide a side: the last window of the row or column holds fewer patches, and the
    down-sampled map is stretched over the whole side, as `torch.nn.functional.interpolate` with a size does.

    Args:
        vision_width: width of the features, C.
        llm_width: width of the LLM's embeddings, D.
        scale_factor: s; 24 x 24 patches become (24 / s)^2 tokens.

    Raises:
        SettingsError: scale_factor is no integer of at least 1.
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
        """Compress a batch of sub-images; none sees another. B may be 0, and then P too.

        Args:
            features: patch features, (B, P, C), any floating dtype; padding may hold anything.
            cls_attention: attention of the class token over patches, (B, P); unused.
            grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer.
            native_weight: weight of the native expert; unused.

        Returns:
            Tokens (B, K, D) in the weights' dtype, in map order; the first ceil(Hu / s) ceil(Wu / s) of each sub-image are
            real. K is the most of any (in a compiled graph, and for B = 0, ceil(P / s)). No indices, no scores, no aux loss.

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
        # The first patch of a window lies on the map wherever the window does.
        mask_BK = seen_BKN[:, :, 0]
        return ProjectorOutput(tokens=torch.where(mask_BK.unsqueeze(-1), self.mlp(attended_BKC), 0), mask=mask_BK)


def most_tokens(grids: Tensor, max_patches: int, scale_factor: int) -> int:
    """K of a batch, read on the host; what a graph, which cannot read, makes room for is more."""
    if torch.compiler.is_compiling() or not grids.shape[0]:
        return token_bound(max_patches, scale_factor)
    return int((-(-grids // scale_factor)).prod(dim=1).max())


def token_bound(max_patches: int, scale_factor: int) -> int:
    """K = ceil(P / s): no map of at most P patches becomes more tokens, and the host need not know its shape.

    A map of a x b tokens has at least (s (a - 1) + 1) (s (b - 1) + 1) patches, which is at least
    s ((a - 1) (b - 1) + (a - 1) + (b - 1)) + 1 = s (a b - 1) + 1, so a b <= ceil(Hu Wu / s). A strip one patch wide
    reaches it: without reading grids no smaller bound holds.
    """
    return -(-max_patches // scale_factor)


def square_windows(grids: Tensor, scale_factor: int, max_tokens: int) -> tuple[Tensor, Tensor]:
    """The s x s window of patches of each token.

    Args:
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) long.
        scale_factor: side of a window in patches, s.
        max_tokens: number of token slots per sub-image, K.

    Returns:
        Patches (B, K, N) long, N = s^2, row by row, and which of them lie on the map (B, K, N) bool; 0 where not.
    """
    row_BK1, column_BK1 = (place.unsqueeze(-1) for place in _token_places(grids, scale_factor, max_tokens))
    inside_N = torch.arange(scale_factor**2, device=grids.device)
    row_BKN = row_BK1 * scale_factor + inside_N // scale_factor
    column_BKN = column_BK1 * scale_factor + inside_N % scale_factor
    rows_B11, columns_B11 = grids[:, :1, None], grids[:, 1:, None]
    seen_BKN = (row_BKN < rows_B11) & (column_BKN < columns_B11)
    return torch.where(seen_BKN, row_BKN * columns_B11 + column_BKN, 0), seen_BKN


def down_sample(feature_BPC: Tensor, grids: Tensor, scale_factor: int, max_tokens: int) -> Tensor:
    """Bilinear down-sampling of each map to ceil(Hu / s) x ceil(Wu / s), without anti-aliasing or aligned corners.

    Args:
        feature_BPC: patch features, (B, P, C).
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) long.
        scale_factor: side of a window in patches, s.
        max_tokens: number of token slots per sub-image, K.

    Returns:
        (B, K, C) in the features' dtype, computed in at least float32; slots past the last token are finite.
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
    """Row and column (B, K) of each token on the down-sampled map; rows run past it after the last token."""
    token_K = torch.arange(max_tokens, device=grids.device)
    token_columns_B1 = -(-grids[:, 1:] // scale_factor)
    return token_K // token_columns_B1, token_K % token_columns_B1


def _neighbours(
    place_BK: Tensor, length_B1: Tensor, scale_factor: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two patches of one axis around each token's centre, and their weights, all (B, K)."""
    num_tokens_B1 = -(-length_B1 // scale_factor)
    # The centre is (place + 1/2) length / tokens - 1/2: kept in whole numbers, so that no rounding moves a patch.
    centre_BK = (2 * place_BK + 1) * length_B1 - num_tokens_B1
    lower_BK = (centre_BK // (2 * num_tokens_B1)).minimum(length_B1 - 1)
    upper_BK = (lower_BK + 1).minimum(length_B1 - 1)
    upper_weight_BK = (centre_BK % (2 * num_tokens_B1)).to(dtype) / (2 * num_tokens_B1)
    return (lower_BK, 1 - upper_weight_BK), (upper_BK, upper_weight_BK)
