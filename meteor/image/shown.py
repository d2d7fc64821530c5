"""Conversion of an open image of any mode to RGB as a viewer shows it, strip by strip to save memory."""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

# Pixels converted at once: a strip in float64 then has 2 MiB, which a processor's cache holds.
_STRIP_PIXELS = 1 << 18

_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def as_shown(image: Image.Image) -> Image.Image:
    """Convert an open image of any mode to RGB as a viewer shows it.

    Returns:
        A new image of mode RGB: upright, transparency on white, deep greyscale scaled to 8 bits.
    """
    return turn(to_rgb(image), orientation(image))


def orientation(image: Image.Image) -> Any:
    """Return the EXIF orientation, 1 if there is none.

    `PIL.ImageOps.exif_transpose` is not used: it rewrites the whole EXIF block, and fails if a single tag is malformed.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, OSError, struct.error):
        return 1  # The pixels of an image with a damaged EXIF block are sound; viewers show them as stored.


def turn(rgb: Image.Image, exif_orientation: Any) -> Image.Image:
    """Turn an image upright, and forget its metadata."""
    transpose = _TRANSPOSE_OF_ORIENTATION.get(exif_orientation)
    upright = rgb if transpose is None else rgb.transpose(transpose)
    # The EXIF block would make the next reader rotate the image again.
    upright.info.clear()
    return upright


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a new image of mode RGB: transparency on white, deep greyscale scaled to 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _strip_by_strip(image, _deep_grey_to_rgb(image))
    if image.has_transparency_data:
        return _strip_by_strip(image, _over_white)
    return image.convert("RGB")


def _strip_by_strip(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        rgb.paste(convert(strip), (0, top))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield the first row of each strip, and the strip."""
    num_rows = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, num_rows):
        yield top, image.crop((0, top, image.width, min(top + num_rows, image.height)))


def _over_white(strip: Image.Image) -> Image.Image:
    rgba = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return a function that scales strips to 8 bits, because Pillow's own conversion clips greyscale at 255."""
    offset, factor = _scale_to_255(image)
    transparent_value = image.info.get("transparency")

    def convert(strip: Image.Image) -> Image.Image:
        values_HW = _float64(strip)
        grey_HW = np.rint((values_HW - offset) * factor)
        if transparent_value is not None:
            grey_HW[values_HW == transparent_value] = 255
        return Image.fromarray(grey_HW.astype(np.uint8)).convert("RGB")

    return convert


def _scale_to_255(image: Image.Image) -> tuple[float, float]:
    """Return the offset and the factor of ``(value - offset) * factor``, which is in [0, 255].

    They come from the format's full scale or, if it has none (32-bit TIFF), from the range of the values.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        return 0.0, 255 / 65535
    ranges = [(values_HW.min(), values_HW.max()) for values_HW in (_float64(strip) for _, strip in _strips(image))]
    # NumPy keeps nan, which Python's min() and max() may drop.
    lowest, highest = float(np.min(ranges)), float(np.max(ranges))
    if not np.isfinite([lowest, highest]).all():
        raise ValueError("the image has pixels that are not finite")
    if lowest >= 0 and highest <= 1:
        return 0.0, 255.0
    if lowest >= 0 and highest <= 255:
        return 0.0, 1.0
    return lowest, 255 / ((highest - lowest) or 1.0)


def _float64(strip: Image.Image) -> npt.NDArray[np.float64]:
    return np.asarray(strip).astype(np.float64)
