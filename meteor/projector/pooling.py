"""Adaptive average pooling of maps of different shapes in one batch; nothing is read on the host.

Letters: B sub-images, P patches (largest number in the batch), K places of the pooled map, X channels.
"""

import torch
from torch import Tensor

from meteor.projector.query_grid import pooling_windows
from meteor.ssm.tensors import accumulation_dtype


def pool_maps(token_BPX: Tensor, grids: Tensor, pooled_grid: tuple[int, int]) -> Tensor:
    """Mean of each window that `pooling_windows` gives: torch's ``adaptive_avg_pool2d`` of every map.

    Args:
        token_BPX: (B, P, X), row-major maps; finite at padding.
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) long.
        pooled_grid: (g, h); a map smaller than that repeats its patches.

    Returns:
        (B, K, X), K = g h in row-major order, accumulated in at least float32.
    """
    dtype = accumulation_dtype(token_BPX.dtype)
    seen_BKP = pooling_windows(grids, pooled_grid, token_BPX.shape[1]).to(dtype)
    weight_BKP = seen_BKP / seen_BKP.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.bmm(weight_BKP, token_BPX.to(dtype)).to(token_BPX.dtype)
