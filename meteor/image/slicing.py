"""Plans, from an image's size alone, its global view and slices (LLaVA-UHD v1's rule; integers in, integers out)."""

import math
import operator
from dataclasses import dataclass

from meteor.errors import BadImageError, SettingsError


@dataclass(frozen=True)
class SlicePlan:
    """How one image becomes sub-images.

    Attributes:
        grid: (columns, rows) of the slices, or None when the global view is the only sub-image.
        global_size: (width, height) in pixels the global view is resized to.
        slice_size: (width, height) in pixels of each slice, or None without slices.
        patch_grids: (Hu, Wu), patch rows and patch columns, of each sub-image: the global view first, then the slices
            row by row.
    """

    grid: tuple[int, int] | None
    global_size: tuple[int, int]
    slice_size: tuple[int, int] | None
    patch_grids: tuple[tuple[int, int], ...]

    @property
    def num_sub_images(self) -> int:
        return len(self.patch_grids)


def plan_slices(
    width: int, height: int, *, max_slices: int = 6, resolution: int = 336, patch_size: int = 14
) -> SlicePlan:
    """Plan the sub-images of an image of ``width`` x ``height`` pixels (as displayed, after EXIF orientation).

    A sub-image of an image of ordinary shape (`check_aspect_ratio`) has at most (resolution / patch_size)^2 patches,
    and there are at most max_slices + 1 sub-images.

    Args:
        width: in pixels, at least 1.
        height: in pixels, at least 1.
        max_slices: cap on the slices, the global view not counted (the paper's 6); 0 or 1 means no slices.
        resolution: side in pixels of the square the encoder was trained on.
        patch_size: side in pixels of one patch; every size planned is a multiple of it.

    Raises:
        ValueError: width or height is not a positive integer.
        SettingsError: another argument is not an integer in its range.

    Source: LLaVA-UHD v1's slicing rule; LLaVA-Meteor, section 4.1, caps it at 6 slices.
    """
    width = _size_argument("width", width)
    height = _size_argument("height", height)
    max_slices = _setting("max_slices", max_slices, minimum=0)
    patch_size = _setting("patch_size", patch_size, minimum=1)
    resolution = _setting("resolution", resolution, minimum=patch_size)

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
    """Refuse an image so long and thin that slicing it gives nonsense: one patch, or more than the encoder knows.

    Args:
        width: in pixels.
        height: in pixels.
        max_aspect_ratio: largest ratio of the longer to the shorter side that is accepted, either way round.

    Raises:
        BadImageError: with the reason ``"aspect_ratio"``.
        SettingsError: the limit is not a number of at least 1.
        ValueError: width or height is not a positive integer.
    """
    if not max_aspect_ratio >= 1:
        raise SettingsError(
            f"max_aspect_ratio is {max_aspect_ratio!r}; it is longer side / shorter side: give at least 1"
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
    """The (columns, rows) whose shape is nearest to the image's; on equal errors the first candidate."""
    counts = [count for count in (multiple - 1, multiple, multiple + 1) if 1 < count <= max_slices]
    candidates = [
        (columns, count // columns) for count in counts for columns in range(1, count + 1) if count % columns == 0
    ]
    log_aspect_ratio = math.log(width / height)
    # The difference of two float64 logarithms, not the logarithm of a quotient: on square images 1x2 and 2x1 tie up to
    # the last bit, and features cached elsewhere by the same rule must agree.
    return min(candidates, key=lambda grid: abs(log_aspect_ratio - math.log(grid[0] / grid[1])))


def _fit(width: int, height: int, resolution: int, patch_size: int) -> tuple[int, int]:
    """The (width, height) of about ``resolution`` squared pixels with this shape, in whole patches.

    Always rescales: an image without slices is scaled up where it is smaller, and one with slices is never smaller.
    """
    aspect_ratio = width / height
    height = int(resolution / math.sqrt(aspect_ratio))
    # From the height already truncated: so the rule goes, and the last patch column depends on it.
    width = int(height * aspect_ratio)
    return max(width // patch_size, 1) * patch_size, max(height // patch_size, 1) * patch_size


def _patch_grid(size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    width, height = size
    return height // patch_size, width // patch_size


def _size_argument(name: str, value: int) -> int:
    # Through index(): a NumPy integer of 32 bits would overflow in width * height.
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} is {value!r}; an image's {name} is a whole number of pixels, at least 1")
    return operator.index(value)


def _setting(name: str, value: int, *, minimum: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < minimum:
        raise SettingsError(f"{name} is {value!r}; slicing needs a whole number of at least {minimum} there")
    return operator.index(value)
