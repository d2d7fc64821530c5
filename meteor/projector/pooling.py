"""Adaptive average pooling of maps of different shapes in one batch, without reads on the host.

Letters: B sub-images, P patches (largest number in the batch), K cells of the pooled map, X channels.
"""

import torch
from torch import Tensor

from meteor.projector.query_grid import pooling_windows
from meteor.ssm.tensors import accumulation_dtype


def pool_maps(token_BPX: Tensor, grids: Tensor, pooled_grid: tuple[int, int]) -> Tensor:
    """Average every map over the windows of `pooling_windows`, as torch's ``adaptive_avg_pool2d`` does for one map.

    Args:
        token_BPX: row-major maps, (B, P, X); finite at padding.
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) long.
        pooled_grid: rows and columns (g, h) of the pooled map; a smaller map repeats its patches.

    Returns:
        Pooled maps, (B, K, X), K = g h in row-major order, accumulated in at least float32.
    """
    dtype = accumulation_dtype(token_BPX.dtype)
    seen_BKP = pooling_windows(grids, pooled_grid, token_BPX.shape[1]).to(dtype)
    weight_BKP = seen_BKP / seen_BKP.sum(dim=-1, keepdim=True).clamp(min=1)
    return torch.bmm(weight_BKP, token_BPX.to(dtype)).to(token_BPX.dtype)
