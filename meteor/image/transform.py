"""Pixels of an image's sub-images: resized and cut by the slice plan, normalised for the encoder."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from meteor.image.slicing import SlicePlan


def slice_image(image: Image.Image, plan: SlicePlan) -> list[npt.NDArray[np.uint8]]:
    """Cut an image into the sub-images of its plan (LLaVA-UHD v1's rule).

    The whole image is resized twice (by the plan's filter, no padding): to the global view, and to the grid of slices, which
    is then cut row by row. The aspect ratio changes by less than a patch.

    Args:
        image: image of mode RGB, of the size for which the plan was made.
        plan: slicing plan from `plan_slices`.

    Returns:
        Contiguous uint8 arrays (h, w, 3): the global view first, then the slices row by row.

    Raises:
        ValueError: the image is not RGB.
    """
    if image.mode != "RGB":
        raise ValueError(f"the image has mode {image.mode!r}; decode it with decode_image, which gives RGB")
    resample = Image.Resampling[plan.resample.upper()]
    sub_images = [np.array(image.resize(plan.global_size, resample))]
    if plan.grid is None or plan.slice_size is None:
        return sub_images
    (columns, rows), (width, height) = plan.grid, plan.slice_size
    resized = np.asarray(image.resize((width * columns, height * rows), resample))
    for row in range(rows):
        for column in range(columns):
            piece = resized[row * height : (row + 1) * height, column * width : (column + 1) * width]
            sub_images.append(piece.copy())
    return sub_images


def normalise(pixels_HW3: npt.NDArray[np.uint8], mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Rescale to [0, 1], subtract the mean and divide by the standard deviation of each colour channel.

    Args:
        pixels_HW3: pixels of a sub-image, (h, w, 3) uint8.
        mean: mean of red, green and blue, each in [0, 1] (`meteor.constants.CLIP_MEAN`).
        std: standard deviation of red, green and blue, each above 0.

    Returns:
        Normalised pixels, (3, h, w) float32, contiguous.

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
    """Move sub-images (h, w, 3) to a device as uint8 and normalise them there, all at once.

    ``(pixels / 255 - mean) / std`` has three float32 operations, and IEEE 754 defines how each is rounded: every device gives
    equal bits. The copy to a GPU uses pinned memory and does not wait for the device.

    Args:
        sub_images: pixels of each sub-image, (h, w, 3) uint8.
        mean: mean of red, green and blue, each in [0, 1].
        std: standard deviation of red, green and blue, each above 0.
        device: device of the result.
        dtype: dtype of the result; the computation is in float32.

    Returns:
        Views (3, h, w) of one tensor in ``dtype``.
    """
    sizes = [sub_image.size for sub_image in sub_images]
    on_gpu = torch.device(device).type == "cuda"
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=on_gpu)
    for part, sub_image in zip(packed.split(sizes), sub_images, strict=True):
        part.numpy()[:] = sub_image.reshape(-1)
    values_X3 = packed.to(device, non_blocking=True).view(-1, 3).float()
    # 255 is a tensor, because CUDA divides by a plain number as a product with its reciprocal, which rounds differently.
    full, mean_3, std_3 = (torch.tensor(value, dtype=torch.float32, device=device) for value in (255.0, mean, std))
    values_X3.div_(full).sub_(mean_3).div_(std_3)
    parts = values_X3.to(dtype).view(-1).split(sizes)
    return [part.view(pixels.shape).permute(2, 0, 1) for part, pixels in zip(parts, sub_images, strict=True)]
