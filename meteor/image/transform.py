"""Turns an image and its slice plan into pixels: resized and cut sub-images, normalised for the encoder."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from meteor.image.slicing import SlicePlan


def slice_image(image: Image.Image, plan: SlicePlan) -> list[npt.NDArray[np.uint8]]:
    """Cut an image into the sub-images of its plan.

    The whole image is resized (bicubic, no padding) twice: to the global view, and to the grid of slices, which is
    then cut row by row. The aspect ratio changes by less than a patch.

    Args:
        image: mode RGB, of the size the plan was made for.
        plan: from `plan_slices`.

    Returns:
        Arrays (h, w, 3), uint8, contiguous: the global view first, then the slices row by row.

    Raises:
        ValueError: the image is not RGB.

    Source: LLaVA-UHD v1.
    """
    if image.mode != "RGB":
        raise ValueError(f"the image has mode {image.mode!r}; decode it with decode_image, which gives RGB")
    sub_images = [np.array(image.resize(plan.global_size, Image.Resampling.BICUBIC))]
    if plan.grid is None or plan.slice_size is None:
        return sub_images
    (columns, rows), (width, height) = plan.grid, plan.slice_size
    resized = np.asarray(image.resize((width * columns, height * rows), Image.Resampling.BICUBIC))
    for row in range(rows):
        for column in range(columns):
            piece = resized[row * height : (row + 1) * height, column * width : (column + 1) * width]
            sub_images.append(piece.copy())
    return sub_images


def normalise(pixels_HW3: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Rescale to [0, 1], subtract the mean and divide by the standard deviation of each colour channel.

    Args:
        pixels_HW3: (h, w, 3), uint8.
        mean: of red, green and blue, in [0, 1] (`meteor.constants.CLIP_MEAN`).
        std: of red, green and blue, positive.

    Returns:
        (3, h, w), float32, contiguous.

    Raises:
        ValueError: the pixels are not (h, w, 3) of uint8, or mean and std are not three numbers each.
    """
    if pixels_HW3.dtype != np.uint8 or pixels_HW3.ndim != 3 or pixels_HW3.shape[2] != 3:
        raise ValueError(f"pixels are {pixels_HW3.dtype} of shape {pixels_HW3.shape}; give uint8 of shape (h, w, 3)")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean is {mean} and std is {std}; give three numbers each, and a std above 0")
    scaled_HW3 = pixels_HW3.astype(np.float32) / np.float32(255)
    normalised_HW3 = (scaled_HW3 - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(normalised_HW3.transpose(2, 0, 1)))
