"""Patches of an image that a projector keeps, and the scores by which it chooses them (the paper's Figure 4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from meteor.data.collate import pad_sub_images
from meteor.features import ImageFeatures
from meteor.projector import Projector


@dataclass(frozen=True, eq=False)
class SelectedPatches:
    """Scores and kept patches of a sub-image.

    Attributes:
        visual: (P,) float32, scores of the visual expert over patches in row-major order; None without this expert.
        native: (P,) float32, scores of the native expert; None without this expert.
        combined: (P,) float32, scores by which patches were chosen; None for a projector that does not select.
        kept: (K,) int, indices of the kept patches.
    """

    visual: np.ndarray | None
    native: np.ndarray | None
    combined: np.ndarray | None
    kept: np.ndarray


@torch.inference_mode()
def select_patches(
    projector: Projector, image: ImageFeatures, *, select_layer: int, k: int | None = None
) -> list[SelectedPatches]:
    """Run the projector over an image's sub-images.

    Args:
        projector: the projector in evaluation mode.
        image: features of the image.
        select_layer: hidden state whose class-token attention the projector reads.
        k: most patches to keep per sub-image, for a projector that takes ``k``; the largest number of training if None.

    Returns:
        The selection of each sub-image, the global view first; a projector that does not select keeps every patch.
    """
    row = image.attention_layers.index(select_layer)
    parts = [
        (features_PC, attention_AP[row], grid)
        for features_PC, attention_AP, grid in zip(image.features, image.cls_attention, image.patch_grids, strict=True)
    ]
    features_SPC, attention_SP = pad_sub_images(parts)
    grids_S2 = torch.tensor(image.patch_grids)
    device = next(projector.parameters()).device
    options = {"k": k} if projector.takes_k else {}
    output = projector(features_SPC.to(device), attention_SP.to(device), grids_S2.to(device), None, **options)
    result = []
    for i, (rows, columns) in enumerate(image.patch_grids):
        visual, native = (
            None if scores is None else scores[i, : rows * columns].float().cpu().numpy()
            for scores in (output.visual_scores, output.native_scores)
        )
        combined = _combined(projector.settings, visual, native)
        kept = np.arange(rows * columns) if output.indices is None else output.indices[i][output.mask[i]].cpu().numpy()
        result.append(SelectedPatches(visual, native, combined, kept))
    return result


def _combined(settings: Mapping[str, Any], visual: np.ndarray | None, native: np.ndarray | None) -> np.ndarray | None:
    """Return the scores that decide the choice; projectors compute both experts even if only one of them decides."""
    if native is None or settings.get("experts") == "visual":
        return visual
    if visual is None or settings.get("experts") == "native":
        return native
    return settings["visual_weight"] * visual + (1 - settings["visual_weight"]) * native
