"""Checks what a projector is given, marks padding, and zeroes it.

Letters: B sub-images, P patches (the most of the batch), C vision width.
"""

import torch
from torch import Tensor


def prepare_features(
    features: Tensor, cls_attention: Tensor, grids: Tensor, *, vision_width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Check the inputs of a projector and clean the features.

    Args:
        features: (B, P, C), any floating dtype; anything, NaN too, at padding.
        cls_attention: (B, P).
        grids: (B, 2) integer, (Hu, Wu) of each sub-image. Best on the CPU: its values are read on the host.
        vision_width: C.
        dtype: of the result.

    Returns:
        Features (B, P, C) in ``dtype``, zero at padding, and mask (B, P) bool, True at real patches.

    Raises:
        ValueError: a shape is wrong, or a grid does not fit P.
    """
    if features.dim() != 3 or features.shape[-1] != vision_width:
        raise ValueError(f"features are {tuple(features.shape)}; this projector takes (B, P, {vision_width}).")
    num_sub_images, max_patches, _ = features.shape
    if cls_attention.shape != features.shape[:2]:
        raise ValueError(
            f"cls_attention is {tuple(cls_attention.shape)}; features ask for {tuple(features.shape[:2])}."
        )
    if grids.shape != (num_sub_images, 2) or grids.is_floating_point():
        raise ValueError(f"grids are {grids.dtype} {tuple(grids.shape)}; they must be integers ({num_sub_images}, 2).")
    for number, (rows, columns) in enumerate(grids.tolist()):
        if rows < 1 or columns < 1 or rows * columns > max_patches:
            raise ValueError(
                f"Sub-image {number} of the batch has the grid ({rows}, {columns}); rows and columns must be at least "
                f"1 and their product at most {max_patches}, the patches that features hold."
            )
    num_patches_B1 = grids.to(features.device).long().prod(dim=1, keepdim=True)
    mask_BP = torch.arange(max_patches, device=features.device) < num_patches_B1
    return torch.where(mask_BP.unsqueeze(-1), features.to(dtype), 0), mask_BP
