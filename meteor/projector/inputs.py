"""Checks of a projector's inputs; padding is marked and set to zero.

Letters: B sub-images, P patches (largest number in the batch), C vision width.
"""

import torch
from torch import Tensor

from meteor.projector.checks import require


def prepare_features(
    features: Tensor, cls_attention: Tensor, grids: Tensor, *, vision_width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Check the inputs of a projector and clean the features.

    Args:
        features: patch features, (B, P, C), any floating dtype; padding may hold anything, even NaN.
        cls_attention: the encoder's importance row, for CLIP the attention of the class token over patches, (B, P).
        grids: patch grid (Hu, Wu) of each sub-image, (B, 2) integer, on any device. A check reads the values on the host,
            except in a compiled graph.
        vision_width: width of the features, C.
        dtype: dtype of the returned features.

    Returns:
        Features, (B, P, C), in ``dtype``, zero at padding, and mask, (B, P) bool, True at real patches.

    Raises:
        ValueError: a shape is wrong, or a grid does not fit P (RuntimeError for a grid in a compiled graph).
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
    fits_B = _fits(grids, max_patches)
    require(
        fits_B.all(),
        "A sub-image's grid does not fit: rows and columns must be at least 1, their product at most the patches of "
        "features.",
        lambda: _misfit(grids, fits_B, max_patches),
    )
    num_patches_B1 = grids.to(features.device).long().prod(dim=1, keepdim=True)
    mask_BP = torch.arange(max_patches, device=features.device) < num_patches_B1
    return torch.where(mask_BP.unsqueeze(-1), features.to(dtype), 0), mask_BP


def _fits(grids: Tensor, max_patches: int) -> Tensor:
    """Mark the grids that fit, (B,) bool. Sides are compared too, because a product of two int64 may wrap around."""
    sides_fit_B = ((grids >= 1) & (grids <= max_patches)).all(dim=1)
    return sides_fit_B & (grids.long().prod(dim=1) <= max_patches)


def _misfit(grids: Tensor, fits_B: Tensor, max_patches: int) -> str:
    number = int(fits_B.logical_not().nonzero()[0])
    rows, columns = grids[number].tolist()
    return (
        f"Sub-image {number} of the batch has the grid ({rows}, {columns}); rows and columns must be at least "
        f"1 and their product at most {max_patches}, the patches that features hold."
    )
