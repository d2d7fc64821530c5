"""Sub-images of an image file as pixels: decoding, slicing plan and resizing in one step."""

import math
from dataclasses import dataclass, replace

import numpy as np

from meteor.image.decode import decoded
from meteor.image.slicing import Resample, SlicePlan, check_aspect_ratio, plan_slices
from meteor.image.transform import slice_image


@dataclass(frozen=True)
class PixelSettings:
    """Settings that determine the encoder's pixels and the images that are refused.

    Attributes:
        max_slices: most slices of an image; the global view is not counted.
        resolution: side in pixels of the square whose area a sub-image has.
        patch_size: side of a patch in pixels.
        max_aspect_ratio: largest ratio of the longer to the shorter side.
        max_pixels: most pixels of an image.
        resample: filter that resizes images.
    """

    max_slices: int = 6
    resolution: int = 336
    patch_size: int = 14
    max_aspect_ratio: float = 24.0
    max_pixels: int = 178_956_970
    resample: Resample = "bicubic"

    def plan(self, width: int, height: int) -> SlicePlan:
        """Plan the slices of an image of ``width`` x ``height`` pixels.

        Raises:
            BadImageError: the aspect ratio is above the limit.
        """
        check_aspect_ratio(width, height, self.max_aspect_ratio)
        plan = plan_slices(
            width, height, max_slices=self.max_slices, resolution=self.resolution, patch_size=self.patch_size
        )
        return plan if self.resample == plan.resample else replace(plan, resample=self.resample)


@dataclass(frozen=True)
class SlicedImage:
    """A decoded image, ready for the encoder.

    Attributes:
        image_key: sha256 of the image file's bytes.
        width, height: pixels of the image as a viewer shows it.
        plan: slicing plan of the image.
        sub_images: uint8 arrays (h, w, 3), the global view first.
    """

    image_key: str
    width: int
    height: int
    plan: SlicePlan
    sub_images: tuple[np.ndarray, ...]

    def to_bytes(self) -> bytes:
        """Return the pixels of all sub-images in order; `from_bytes` reads them."""
        return np.concatenate([sub_image.reshape(-1) for sub_image in self.sub_images]).tobytes()

    @classmethod
    def from_bytes(
        cls, image_key: str, width: int, height: int, pixels: bytes | memoryview, settings: "PixelSettings"
    ) -> "SlicedImage":
        """Undo `to_bytes`: the plan follows from the image's size, and sub-images share the memory of ``pixels``."""
        plan, side = settings.plan(width, height), settings.patch_size
        shapes = [(rows * side, columns * side, 3) for rows, columns in plan.patch_grids]
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        parts = np.split(np.frombuffer(pixels, dtype=np.uint8), ends[:-1])
        sub_images = tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        return cls(image_key, width, height, plan, sub_images)


def slice_bytes(data: bytes, image_key: str, settings: PixelSettings) -> SlicedImage:
    """Decode and slice an image file (LLaVA-UHD's slicing rule).

    Raises:
        BadImageError: the file is not an image or truncated, or the image is too large or too elongated.
    """
    with decoded(data, max_pixels=settings.max_pixels) as image:
        plan = settings.plan(image.width, image.height)
        return SlicedImage(image_key, image.width, image.height, plan, tuple(slice_image(image, plan)))
