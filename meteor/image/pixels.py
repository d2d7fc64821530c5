"""From a file's bytes to the pixels of an image's sub-images."""

import math
from dataclasses import dataclass

import numpy as np

from meteor.image.decode import decode_image
from meteor.image.slicing import SlicePlan, check_aspect_ratio, plan_slices
from meteor.image.transform import slice_image


@dataclass(frozen=True)
class PixelSettings:
    """What decides which pixels the encoder gets, and which images it refuses."""

    max_slices: int = 6
    resolution: int = 336
    patch_size: int = 14
    max_aspect_ratio: float = 24.0
    max_pixels: int = 178_956_970

    def plan(self, width: int, height: int) -> SlicePlan:
        """The slices of an image of this size; `BadImageError` where its aspect ratio is refused."""
        check_aspect_ratio(width, height, self.max_aspect_ratio)
        return plan_slices(
            width, height, max_slices=self.max_slices, resolution=self.resolution, patch_size=self.patch_size
        )


@dataclass(frozen=True)
class SlicedImage:
    """A decoded image, ready for the encoder: sub-images as uint8 (h, w, 3), the global view first."""

    image_key: str
    width: int
    height: int
    plan: SlicePlan
    sub_images: tuple[np.ndarray, ...]

    def to_bytes(self) -> bytes:
        """The pixels of all sub-images, one after the other; `from_bytes` reads them."""
        return np.concatenate([sub_image.reshape(-1) for sub_image in self.sub_images]).tobytes()

    @classmethod
    def from_bytes(
        cls, image_key: str, width: int, height: int, pixels: bytes | memoryview, settings: "PixelSettings"
    ) -> "SlicedImage":
        """The inverse: the plan follows from the image's size, and the sub-images share the memory of ``pixels``."""
        plan, side = settings.plan(width, height), settings.patch_size
        shapes = [(rows * side, columns * side, 3) for rows, columns in plan.patch_grids]
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        parts = np.split(np.frombuffer(pixels, dtype=np.uint8), ends[:-1])
        sub_images = tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
        return cls(image_key, width, height, plan, sub_images)


def slice_bytes(data: bytes, image_key: str, settings: PixelSettings) -> SlicedImage:
    """From a file's bytes to sub-images (spec: slicing rule, steps 1 to 7).

    Raises:
        BadImageError: not an image, truncated, too large, or too long.
    """
    image = decode_image(data, max_pixels=settings.max_pixels)
    plan = settings.plan(image.width, image.height)
    return SlicedImage(image_key, image.width, image.height, plan, tuple(slice_image(image, plan)))
