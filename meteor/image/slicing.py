"""Slicing plan: global view and slices of an image, from its size alone (LLaVA-UHD v1's rule, integers only)."""

import math
import operator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from meteor.errors import BadImageError, SettingsError

# Filters that resize an image, named as Pillow names them.
Resample = Literal["bicubic", "bilinear", "lanczos"]


@dataclass(frozen=True)
class SlicePlan:
    """Sub-images of one image.

    Attributes:
        grid: columns and rows of the slices; None if the global view is the only sub-image.
        global_size: width and height of the resized global view in pixels.
        slice_size: width and height of each resized slice in pixels; None without slices.
        patch_grids: patch rows and columns (Hu, Wu) of each sub-image, the global view first, then the slices row by row.
        resample: filter that resizes the image.
    """

    grid: tuple[int, int] | None
    global_size: tuple[int, int]
    slice_size: tuple[int, int] | None
    patch_grids: tuple[tuple[int, int], ...]
    resample: Resample = "bicubic"

    @property
    def num_sub_images(self) -> int:
        return len(self.patch_grids)


def plan_slices(
    width: int, height: int, *, max_slices: int = 6, resolution: int = 336, patch_size: int = 14
) -> SlicePlan:
    """Plan the sub-images of an image of ``width`` x ``height`` pixels (as displayed, after EXIF orientation).

    The rule is LLaVA-UHD v1's; LLaVA-Meteor, section 4.1, limits it to 6 slices. There are at most max_slices + 1
    sub-images. If the image passes `check_aspect_ratio`, each has at most (resolution / patch_size)^2 patches.

    Args:
        width: width of the image in pixels, at least 1.
        height: height of the image in pixels, at least 1.
        max_slices: most slices, the global view not counted (6 in the paper); 0 or 1 means no slices.
        resolution: side in pixels of the square images on which the encoder was trained.
        patch_size: side of a patch in pixels; every planned size is a multiple.

    Raises:
        ValueError: width or height is not a positive integer.
        SettingsError: another argument is not an integer in its range.
    """
    width = _size_argument("width", width)
    height = _size_argument("height", height)
    max_slices = _setting("max_slices", max_slices, minimum=0)
    patch_size = _setting("patch_size", patch_size, minimum=1)
    resolution = _setting("resolution", resolution, minimum=patch_size)

    # Ceiling division in whole numbers: floats would round large areas.
    ideal_num_slices = -(-width * height // resolution**2)
    multiple = min(ideal_num_slices, max_slices)
    global_size = _fit(width, height, resolution, patch_size)
    global_grid = _patch_grid(global_size, patch_size)
    if multiple <= 1:
        return SlicePlan(grid=None, global_size=global_size, slice_size=None, patch_grids=(global_grid,))

    columns, rows = _choose_grid(width, height, multiple, max_slices)
    slice_size = _fit(max(width // columns, 1), max(height // rows, 1), resolution, patch_size)
    slice_grids = (_patch_grid(slice_size, patch_size),) * (columns * rows)
    return SlicePlan((columns, rows), global_size, slice_size, (global_grid, *slice_grids))


def check_aspect_ratio(width: int, height: int, max_aspect_ratio: float) -> None:
    """Refuse an image too elongated to slice: it would give a single patch, or more patches than the encoder allows.

    Args:
        width: width of the image in pixels.
        height: height of the image in pixels.
        max_aspect_ratio: largest accepted ratio of the longer to the shorter side.

    Raises:
        BadImageError: the ratio is above the limit; the reason is ``"aspect_ratio"``.
        SettingsError: the limit is not a number of at least 1.
        ValueError: width or height is not a positive integer.
    """
    if not max_aspect_ratio >= 1:
        raise SettingsError(
            f"max_aspect_ratio is {max_aspect_ratio!r}; as the ratio longer side / shorter side it must be at least 1"
        )
    width = _size_argument("width", width)
    height = _size_argument("height", height)
    aspect_ratio = max(width, height) / min(width, height)
    if aspect_ratio > max_aspect_ratio:
        raise BadImageError(
            "aspect_ratio",
            f"the image is {width}x{height} pixels, an aspect ratio of {aspect_ratio:.1f}:1, and the limit is "
            f"{max_aspect_ratio:g}:1; crop the image or raise the limit",
        )


def _choose_grid(width: int, height: int, multiple: int, max_slices: int) -> tuple[int, int]:
    """Return the (columns, rows) with the shape nearest to the image's; ties go to the first candidate."""
    log_aspect_ratio = math.log(width / height)
    # The published rule subtracts two float64 logarithms. The logarithm of a quotient could differ in the last bit, and
    # the tie of 1x2 and 2x1 on square images would be decided otherwise.
    distances = [(abs(log_aspect_ratio - log), grid) for log, grid in _candidates(multiple, max_slices)]
    return min(distances, key=operator.itemgetter(0))[1]


@lru_cache
def _candidates(multiple: int, max_slices: int) -> list[tuple[float, tuple[int, int]]]:
    """Return the logarithm of the shape of each grid with about ``multiple`` slices, and the grid, in the rule's order."""
    counts = [count for count in (multiple - 1, multiple, multiple + 1) if 1 < count <= max_slices]
    grids = [(columns, count // columns) for count in counts for columns in range(1, count + 1) if count % columns == 0]
    return [(math.log(columns / rows), (columns, rows)) for columns, rows in grids]


def _fit(width: int, height: int, resolution: int, patch_size: int) -> tuple[int, int]:
    """Return the (width, height) of about ``resolution`` squared pixels with this shape, in whole patches.

    Sizes are always rescaled, so small images are scaled up. Only images without slices can be smaller than the target.
    """
    aspect_ratio = width / height
    height = int(resolution / math.sqrt(aspect_ratio))
    # The rule computes the width from the truncated height, and the last column of patches can depend on that.
    width = int(height * aspect_ratio)
    return max(width // patch_size, 1) * patch_size, max(height // patch_size, 1) * patch_size


def _patch_grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    width, height = size
    return height // patch_size, width // patch_size


def _size_argument(name: str, value: int) -> int:
    if type(value) is int and value >= 1:
        return value
    # operator.index() makes a Python integer: NumPy's 32-bit integers would overflow in width * height.
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} is {value!r}; an image's {name} is a whole number of pixels, at least 1")
    return operator.index(value)


def _setting(name: str, value: int, *, minimum: int) -> int:
    if type(value) is int and value >= minimum:
        return value
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < minimum:
        raise SettingsError(f"{name} is {value!r}; slicing needs a whole number of at least {minimum} there")
    return operator.index(value)
