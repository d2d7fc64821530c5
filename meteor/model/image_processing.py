"""Image processor of a model: images become normalised sub-images, packed patch by patch in one tensor.

Packed patches of several prompts are put together by ``torch.cat``, whatever the sizes of their images.

Letters: S sub-images of all images, N patches of all sub-images, F = 3 x patch size x patch size numbers of a patch.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_transforms import to_pil_image
from transformers.image_utils import make_flat_list_of_images

from meteor.constants import CLIP_MEAN, CLIP_STD
from meteor.data.collate import ImageLayout
from meteor.errors import DataError
from meteor.image.pixels import PixelSettings
from meteor.image.shown import as_shown
from meteor.image.slicing import Resample
from meteor.image.transform import normalise, slice_image
from meteor.model.configuration import MeteorConfig
from meteor.model.remote import AUTO_MAP


class MeteorImageProcessor(BaseImageProcessor):
    """LLaVA-UHD slicing and normalisation; saved as ``preprocessor_config.json``.

    Args:
        max_slices, resolution, patch_size, max_aspect_ratio, max_pixels, resample: see `meteor.image.pixels.PixelSettings`.
        image_mean, image_std: normalisation of the vision tower's input, per colour channel.
        sub_images: ``global`` if stage 2 was trained on the global view alone.
    """

    model_input_names = ["pixel_values", "grids"]  # noqa: RUF012  (transformers reads a plain list)

    def __init__(
        self,
        max_slices: int = PixelSettings.max_slices,
        resolution: int = PixelSettings.resolution,
        patch_size: int = PixelSettings.patch_size,
        max_aspect_ratio: float = PixelSettings.max_aspect_ratio,
        max_pixels: int = PixelSettings.max_pixels,
        resample: Resample = PixelSettings.resample,
        image_mean: tuple[float, ...] = CLIP_MEAN,
        image_std: tuple[float, ...] = CLIP_STD,
        sub_images: Literal["all", "global"] = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.max_slices, self.resolution, self.patch_size = max_slices, resolution, patch_size
        self.max_aspect_ratio, self.max_pixels, self.resample = max_aspect_ratio, max_pixels, resample
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.sub_images = sub_images
        self.auto_map = AUTO_MAP["image_processor"]

    @property
    def pixels(self) -> PixelSettings:
        """Slicing parameters and size limits."""
        return PixelSettings(
            self.max_slices, self.resolution, self.patch_size, self.max_aspect_ratio, self.max_pixels, self.resample
        )

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Slice and normalise images.

        Args:
            images: an image or a (nested) list of images: PIL images, or arrays and tensors of 8-bit pixels.
            return_tensors: "pt" or "np"; torch tensors if None.
            kwargs: ignored, as the settings belong to the trained model.

        Returns:
            ``pixel_values`` (N, F) float32, see `pack_pixels`, global views first in each image; ``grids`` (S, 2), rows and
            columns of patches of each sub-image; for each image ``slice_grids``, its columns and rows of slices or (0, 0),
            and ``num_sub_images``.

        Raises:
            BadImageError: the aspect ratio of an image is above the limit.
        """
        parts: list[torch.Tensor] = []
        grids: list[tuple[int, int]] = []
        slice_grids: list[tuple[int, int]] = []
        counts: list[int] = []
        for image in make_flat_list_of_images(self.fetch_images(images)):
            shown = as_shown(image if isinstance(image, Image.Image) else to_pil_image(_as_array(image)))
            plan = self.pixels.plan(shown.width, shown.height)
            layout = ImageLayout(plan.grid, plan.patch_grids)
            if self.sub_images == "global":
                layout = layout.only_global()
            pixels = slice_image(shown, plan)[: len(layout.patch_grids)]
            parts += [normalise(part, self.image_mean, self.image_std) for part in pixels]
            grids += layout.patch_grids
            slice_grids.append(layout.grid or (0, 0))
            counts.append(len(layout.patch_grids))
        data = {
            "pixel_values": pack_pixels(parts, self.patch_size),
            "grids": torch.tensor(grids),
            "slice_grids": torch.tensor(slice_grids),
            "num_sub_images": torch.tensor(counts),
        }
        return BatchFeature(data, tensor_type=return_tensors)


def pack_pixels(parts: Sequence[torch.Tensor], patch_size: int) -> torch.Tensor:
    """Pack sub-images (3, h, w) into their patches, row by row, (N, F); the numbers of a patch are in the order (3, h, w)."""
    return torch.cat(
        [
            part.unflatten(2, (-1, patch_size))
            .unflatten(1, (-1, patch_size))
            .permute(1, 3, 0, 2, 4)
            .flatten(2)
            .flatten(0, 1)
            for part in parts
        ]
    )


def unpack_pixels(packed_NF: torch.Tensor, grids: Sequence[tuple[int, int]], patch_size: int) -> list[torch.Tensor]:
    """Undo `pack_pixels`.

    Args:
        packed_NF: patches of all sub-images, (N, F).
        grids: rows and columns of patches of each sub-image.
        patch_size: side of a patch in pixels.

    Returns:
        Sub-images, each (3, h, w).

    Raises:
        DataError: the grids do not describe as many patches.
    """
    counts = [rows * columns for rows, columns in grids]
    if sum(counts) != len(packed_NF):
        raise DataError(
            f"pixel_values has {len(packed_NF)} patches, and grids describes {sum(counts)}: give both as the processor makes "
            "them"
        )
    return [
        patches.view(rows, columns, 3, patch_size, patch_size).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
        for patches, (rows, columns) in zip(packed_NF.split(counts), grids, strict=True)
    ]


def _as_array(image: Any) -> np.ndarray:
    return image.cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)


AutoImageProcessor.register(MeteorConfig, MeteorImageProcessor)
