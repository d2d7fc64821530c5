"""What a model's projector keeps of an image, and the scores by which it chose (the paper's Figure 4)."""

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
    """One sub-image: scores over its P patches, row-major, and the indices of the K kept ones; None where it has none."""

    visual: np.ndarray | None
    native: np.ndarray | None
    combined: np.ndarray | None
    kept: np.ndarray


@torch.inference_mode()
def select_patches(projector: Projector, image: ImageFeatures, *, select_layer: int) -> list[SelectedPatches]:
    """Run the projector over an image's sub-images.

    Args:
        projector: in evaluation mode.
        image: its features.
        select_layer: hidden state whose class-token attention the projector reads.

    Returns:
        One for each sub-image, the global view first; a projector that does not select keeps every patch.
    """
    row = image.attention_layers.index(select_layer)
    parts = [
        (features_PC, attention_AP[row], grid)
        for features_PC, attention_AP, grid in zip(image.features, image.cls_attention, image.patch_grids, strict=True)
    ]
    features_SPC, attention_SP = pad_sub_images(parts)
    grids_S2 = torch.tensor(image.patch_grids)
    device = next(projector.parameters()).device
    output = projector(features_SPC.to(device), attention_SP.to(device), grids_S2.to(device), None)
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
    """The scores that the choice goes by: both experts are computed even where only one of them chooses."""
    if native is None or settings.get("experts") == "visual":
        return visual
    if visual is None or settings.get("experts") == "native":
        return native
    return settings["visual_weight"] * visual + (1 - settings["visual_weight"]) * native
