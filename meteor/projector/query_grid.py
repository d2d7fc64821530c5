"""Attention of a grid of queries over maps of different shapes in one batch: each query sees its window of the map.

Nothing here reads the values of grids on the host.

Letters: B sub-images, P patches (largest number in the batch), K queries, N patches per window, H heads, X channels, Y
channels per head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteor.ssm.tensors import accumulation_dtype, gather_rows

INIT_STD = 0.02


def most_square_grid(count: int) -> tuple[int, int]:
    """Return rows <= columns of the most square grid with ``count`` cells: 12 x 12 for 144, 4 x 8 for 32."""
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    return rows, count // rows


def most_heads(width: int, limit: int) -> int:
    """Return the largest number of heads up to ``limit`` (at least 1) that divides the width."""
    return next(heads for heads in range(max(limit, 1), 0, -1) if width % heads == 0)


def init_linear(linear: nn.Linear) -> nn.Linear:
    """Initialise with normal weights of deviation 0.02 and zero bias, as vision transformers do (our choice)."""
    nn.init.normal_(linear.weight, std=INIT_STD)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def pooling_windows(grids: Tensor, query_grid: tuple[int, int], max_patches: int) -> Tensor:
    """Return the patches that each query sees when a grid of fixed size divides every map.

    Query (r, c) of a g x h grid sees rows floor(r Hu / g) ... ceil((r + 1) Hu / g) - 1 of the map, and columns likewise.
    These are the windows of adaptive average pooling. They cover the map, and overlap by at most a row or column if g does
    not divide Hu. Each window holds at least one patch; on a map smaller than the grid, neighbours share patches.

    Args:
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) long.
        query_grid: rows and columns (g, h) of the grid of queries.
        max_patches: padded number of patches, P.

    Returns:
        Mask of seen patches, (B, K, P) bool, K = g h in row-major order; False at padding.
    """
    rows_B1, columns_B1 = grids.split(1, dim=1)
    patch_P = torch.arange(max_patches, device=grids.device)
    in_rows = _in_window(patch_P // columns_B1, rows_B1, query_grid[0])
    in_columns = _in_window(patch_P % columns_B1, columns_B1, query_grid[1])
    return (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).flatten(1, 2)


def _in_window(place_BP: Tensor, length_B1: Tensor, num_windows: int) -> Tensor:
    """Return the places on an axis that each of its windows holds, (B, num_windows, P) bool."""
    window_W = torch.arange(num_windows, device=place_BP.device)
    first_BW1 = (window_W * length_B1 // num_windows).unsqueeze(-1)
    # Negative floor division is ceiling division, exact in whole numbers.
    end_BW1 = -((window_W + 1) * -length_B1 // num_windows).unsqueeze(-1)
    place_B1P = place_BP.unsqueeze(1)
    return (first_BW1 <= place_B1P) & (place_B1P < end_BW1)


class GridAttention(nn.Module):
    """Multi-head attention with biases in all four linear maps: 4 X^2 + 4 X parameters.

    A mask or small windows can say what a query sees; the weights and the result are equal in both forms.

    Args:
        width: number of channels, X.
        num_heads: number of heads, H; divides the width.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (init_linear(nn.Linear(width, width)) for _ in range(4))

    def forward(self, query_BKX: Tensor, key_BPX: Tensor, value_BPX: Tensor, seen_BKP: Tensor) -> Tensor:
        """Attend with a mask over all patches.

        Args:
            query_BKX: queries, (B, K, X).
            key_BPX: keys, (B, P, X).
            value_BPX: values, (B, P, X).
            seen_BKP: mask of seen patches, (B, K, P) bool; every query sees at least one patch.

        Returns:
            The attended rows, (B, K, X).
        """
        query, key, value = (
            linear(row).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, row in ((self.query, query_BKX), (self.key, key_BPX), (self.value, value_BPX))
        )
        seen_B1KP = seen_BKP.unsqueeze(1)
        attended_BHKY = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_B1KP)
        return self.output(attended_BHKY.transpose(1, 2).flatten(2))

    def over_windows(
        self, query_BKX: Tensor, key_BPX: Tensor, value_BPX: Tensor, window_BKN: Tensor, seen_BKN: Tensor
    ) -> Tensor:
        """Attend to small windows of equal size, in O(K N) instead of O(K P); softmax runs in float32.

        Args:
            query_BKX: queries, (B, K, X).
            key_BPX: keys, (B, P, X).
            value_BPX: values, (B, P, X).
            window_BKN: patches of each query's window, (B, K, N) long; any patch number at unseen places.
            seen_BKN: mask of the window's seen places, (B, K, N) bool. A query that sees nothing gets a finite,
                meaningless result.

        Returns:
            The attended rows, (B, K, X).
        """
        dtype = accumulation_dtype(query_BKX.dtype)
        query_BKHY = self.query(query_BKX).unflatten(-1, (self.num_heads, -1)).to(dtype)
        key_BKNHY = self._gather(self.key(key_BPX), window_BKN).to(dtype)
        value_BKNHY = self._gather(self.value(value_BPX), window_BKN).to(dtype)
        # Sums of products instead of matrix products: K tiny products per head are slow, and autocast would round the
        # logits.
        logit_BKNH = (query_BKHY.unsqueeze(2) * key_BKNHY).sum(dim=-1) / math.sqrt(query_BKHY.shape[-1])
        # The lowest finite number instead of -inf: a row without any patch would become NaN, and its gradient too.
        logit_BKNH = torch.where(seen_BKN.unsqueeze(-1), logit_BKNH, torch.finfo(dtype).min)
        attended_BKHY = (logit_BKNH.softmax(dim=2).unsqueeze(-1) * value_BKNHY).sum(dim=2)
        return self.output(attended_BKHY.flatten(2).to(query_BKX.dtype))

    def _gather(self, row_BPX: Tensor, window_BKN: Tensor) -> Tensor:
        gathered = gather_rows(row_BPX, window_BKN.flatten(1))
        return gathered.unflatten(1, window_BKN.shape[1:]).unflatten(-1, (self.num_heads, -1))
