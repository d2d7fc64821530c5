"""Attention of a grid of queries over maps of different shapes in one batch, each query to its own window of the map.

Nothing here reads the values of grids on the host.

Letters: B sub-images, P patches (largest number in the batch), K queries, N patches of a window, H heads, X channels, Y
channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meteor.ssm.tensors import accumulation_dtype, gather_rows

INIT_STD = 0.02


def most_square_grid(count: int) -> tuple[int, int]:
    """Rows and columns, rows <= columns, of the most square grid with ``count`` cells: 144 is 12 x 12, 32 is 4 x 8."""
    rows = next(rows for rows in range(math.isqrt(count), 0, -1) if count % rows == 0)
    return rows, count // rows


def most_heads(width: int, limit: int) -> int:
    """The largest number of heads up to ``limit`` (at least 1) that divides the width."""
    return next(heads for heads in range(max(limit, 1), 0, -1) if width % heads == 0)


def init_linear(linear: nn.Linear) -> nn.Linear:
    """Normal weights of deviation 0.02, zero bias: what vision transformers use (our choice; the specification is silent)."""
    nn.init.normal_(linear.weight, std=INIT_STD)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def pooling_windows(grids: Tensor, query_grid: tuple[int, int], max_patches: int) -> Tensor:
    """Which patches each query sees when a grid of fixed size divides every map.

    Query (r, c) of a g x h grid sees the rows floor(r Hu / g) ... ceil((r + 1) Hu / g) - 1 of the map and likewise the
    columns: the windows of adaptive average pooling. They cover the map, overlap by at most a row or column where g
    does not divide Hu, and hold at least one patch on any map, one smaller than the grid too (neighbours share it then).

    Args:
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) long.
        query_grid: (g, h).
        max_patches: padded number of patches, P.

    Returns:
        (B, K, P) bool, K = g h in row-major order; False at padding.
    """
    rows_B1, columns_B1 = grids.split(1, dim=1)
    patch_P = torch.arange(max_patches, device=grids.device)
    in_rows = _in_window(patch_P // columns_B1, rows_B1, query_grid[0])
    in_columns = _in_window(patch_P % columns_B1, columns_B1, query_grid[1])
    return (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).flatten(1, 2)


def _in_window(place_BP: Tensor, length_B1: Tensor, num_windows: int) -> Tensor:
    """(B, num_windows, P) bool: which places on one axis of this length each of its windows holds."""
    window_W = torch.arange(num_windows, device=place_BP.device)
    first_BW1 = (window_W * length_B1 // num_windows).unsqueeze(-1)
    end_BW1 = -((window_W + 1) * -length_B1 // num_windows).unsqueeze(-1)
    place_B1P = place_BP.unsqueeze(1)
    return (first_BW1 <= place_B1P) & (place_B1P < end_BW1)


class GridAttention(nn.Module):
    """Multi-head attention with biases in all four maps: 4 X^2 + 4 X parameters.

    Two ways to say what a query sees, same weights and same result; softmax runs in float32.

    Args:
        width: X.
        num_heads: H; divides the width.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.output = (init_linear(nn.Linear(width, width)) for _ in range(4))

    def forward(self, query_BKX: Tensor, key_BPX: Tensor, value_BPX: Tensor, seen_BKP: Tensor) -> Tensor:
        """Attend with a mask over all patches.

        Args:
            query_BKX: (B, K, X).
            key_BPX: (B, P, X).
            value_BPX: (B, P, X).
            seen_BKP: (B, K, P) bool; every query sees at least one patch.

        Returns:
            (B, K, X).
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
        """Attend to small windows of equal size: O(K N) instead of O(K P).

        Args:
            query_BKX: (B, K, X).
            key_BPX: (B, P, X).
            value_BPX: (B, P, X).
            window_BKN: (B, K, N) long, the patches of each query's window; any patch where not seen.
            seen_BKN: (B, K, N) bool. A query that sees nothing gets something finite and meaningless.

        Returns:
            (B, K, X).
        """
        dtype = accumulation_dtype(query_BKX.dtype)
        query_BKHY = self.query(query_BKX).unflatten(-1, (self.num_heads, -1)).to(dtype)
        key_BKNHY = self._gather(self.key(key_BPX), window_BKN).to(dtype)
        value_BKNHY = self._gather(self.value(value_BPX), window_BKN).to(dtype)
        # Sums of products, not matrix products: K tiny ones for each head are slow, and autocast would round the logits.
        logit_BKNH = (query_BKHY.unsqueeze(2) * key_BKNHY).sum(dim=-1) / math.sqrt(query_BKHY.shape[-1])
        # The lowest finite number, not -inf: a row without any patch would be NaN, and so would its gradient.
        logit_BKNH = torch.where(seen_BKN.unsqueeze(-1), logit_BKNH, torch.finfo(dtype).min)
        attended_BKHY = (logit_BKNH.softmax(dim=2).unsqueeze(-1) * value_BKNHY).sum(dim=2)
        return self.output(attended_BKHY.flatten(2).to(query_BKX.dtype))

    def _gather(self, row_BPX: Tensor, window_BKN: Tensor) -> Tensor:
        gathered = gather_rows(row_BPX, window_BKN.flatten(1))
        return gathered.unflatten(1, window_BKN.shape[1:]).unflatten(-1, (self.num_heads, -1))
