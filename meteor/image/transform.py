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
    return normalise_batch([pixels_HW3], mean, std)[0].contiguous()


def normalise_batch(
    sub_images: Sequence[npt.NDArray[np.uint8]],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    """Move sub-images (h, w, 3) to a device as the bytes they are and normalise them there, all at once.

    ``(pixels / 255 - mean) / std`` is three float32 operations, each of which IEEE 754 rounds in one way: every device gives
    the same bits. From pinned memory, and without waiting for the device.

    Returns:
        Views (3, h, w) of one tensor in ``dtype``.
    """
    sizes = [sub_image.size for sub_image in sub_images]
    on_gpu = torch.device(device).type == "cuda"
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu)
    for part, sub_image in zip(packed.split(sizes), sub_images, strict=True):
        part.numpy()[:] = sub_image.reshape(-1)
    values_X3 = packed.to(device, non_blocking=True).view(-1, 3).float()
    # 255 as a tensor: CUDA would multiply by the reciprocal of a plain number, which rounds otherwise.
    full, mean_3, std_3 = (torch.tensor(one, dtype=torch.float32, device=device) for one in (255.0, mean, std))
    values_X3.div_(full).sub_(mean_3).div_(std_3)
    parts = values_X3.to(dtype).view(-1).split(sizes)
    return [part.view(one.shape).permute(2, 0, 1) for part, one in zip(parts, sub_images, strict=True)]
