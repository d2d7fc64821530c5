"""Decoding of image files to RGB as a viewer shows them; unusable files get a reason code."""

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from meteor.errors import BadImageError, SettingsError
from meteor.image.png import PNG, without_metadata

# A closed list, because other plugins of Pillow start programs (EPS) or guess without a signature (TGA).
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
_SIGNATURES = (b"\xff\xd8\xff", PNG, b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
_END_MARKERS = {b"\xff\xd8\xff": b"\xff\xd9", PNG: b"IEND\xaeB`\x82", b"GIF8": b";"}

# Exceptions that Pillow's decoders of these formats raise on damaged files.
_DECODING_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)

_TRANSPOSE_OF_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode an image file to RGB, oriented and coloured as a viewer shows it.

    EXIF orientation is applied. Transparency is laid over white. An animation gives its first frame. Greyscale with more
    than 8 bits is scaled to 8 bits. Colour profiles are not applied, as in CLIP's and LLaVA's own preprocessing.

    Args:
        data: bytes of the file (JPEG, PNG, GIF, WebP, BMP, TIFF, PPM, JPEG 2000 or AVIF).
        max_pixels: most pixels (width x height) of an image, checked in the header before anything is decoded. Pillow's
            own limit (`PIL.Image.MAX_IMAGE_PIXELS`) holds as well.

    Returns:
        An image of mode RGB, fully loaded.

    Raises:
        BadImageError: the image cannot be used. The reason is ``"empty"`` (no bytes), ``"not_an_image"`` (no known
            format), ``"truncated"`` (the file ends early), ``"too_many_pixels"``, or ``"unreadable"`` (damaged in another
            way, or a variant that cannot be decoded).
        SettingsError: max_pixels is below 1.
    """
    if max_pixels < 1:
        raise SettingsError(f"max_pixels is {max_pixels!r}; give the most pixels an image may have, at least 1")
    if not data:
        raise BadImageError("empty", "the image file has 0 bytes; restore it or remove the samples that name it")
    try:
        with _pillow_warnings.tamed(), _open(data) as image:
            _check_num_pixels(image, max_pixels)
            image.load()
            return as_shown(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImageError("too_many_pixels", f"{error} (Pillow's limit, whatever max_pixels is)") from error
    except _DECODING_ERRORS as error:
        _refuse(data, error)


def as_shown(image: Image.Image) -> Image.Image:
    """Convert an open image of any mode to RGB as a viewer shows it.

    Returns:
        A new image of mode RGB: upright, transparency on white, deep greyscale scaled to 8 bits.
    """
    transpose = _TRANSPOSE_OF_ORIENTATION.get(_orientation(image))
    rgb = _to_rgb(image)
    upright = rgb if transpose is None else rgb.transpose(transpose)
    # The EXIF block would make the next reader rotate the image again.
    upright.info.clear()
    return upright


def _open(data: bytes) -> Image.Image:
    data = without_metadata(data) if data.startswith(PNG) else data
    # Pillow knows AVIF only from version 11.3, and raises KeyError for the name of an unknown format.
    Image.init()
    return Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])


def _check_num_pixels(image: Image.Image, max_pixels: int) -> None:
    num_pixels = image.width * image.height
    if num_pixels > max_pixels:
        raise BadImageError(
            "too_many_pixels",
            f"the image is {image.width}x{image.height}, {num_pixels} pixels, and the limit is {max_pixels}; "
            "make it smaller or raise max_pixels",
        )


def _orientation(image: Image.Image) -> Any:
    """Return the EXIF orientation, 1 if there is none.

    `PIL.ImageOps.exif_transpose` is not used: it rewrites the whole EXIF block, and fails if a single tag is malformed.
    """
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except (SyntaxError, ValueError, OSError, struct.error):
        return 1  # The pixels of an image with a damaged EXIF block are sound; viewers show them as stored.


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey_to_rgb(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Scale greyscale of more than 8 bits to 8 bits, because Pillow's own conversion clips it at 255."""
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    values_HW = np.asarray(image).astype(np.float64)
    grey_HW = np.rint(_scale_to_255(values_HW, is_16_bit=is_16_bit))
    transparent_value = image.info.get("transparency")
    if transparent_value is not None:
        grey_HW[values_HW == transparent_value] = 255
    return Image.fromarray(grey_HW.astype(np.uint8)).convert("RGB")


def _scale_to_255(values_HW: npt.NDArray[np.float64], *, is_16_bit: bool) -> npt.NDArray[np.float64]:
    """Scale values to [0, 255] by the format's full scale or, if it has none (32-bit TIFF), by the values' range."""
    lowest, highest = float(values_HW.min()), float(values_HW.max())
    if is_16_bit:
        return values_HW * (255 / 65535)
    if not np.isfinite([lowest, highest]).all():
        raise ValueError("the image has pixels that are not finite")
    if lowest >= 0 and highest <= 1:
        return values_HW * 255
    if lowest >= 0 and highest <= 255:
        return values_HW
    return (values_HW - lowest) * (255 / ((highest - lowest) or 1.0))


def _refuse(data: bytes, error: Exception) -> NoReturn:
    # Pillow's own message for an unidentified image contains only the memory address of the buffer.
    details = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else str(error)
    if _is_cut_short(data, error):
        raise BadImageError(
            "truncated", f"the image file ends early, after {len(data)} bytes ({details}); copy or download it again"
        ) from error
    if isinstance(error, UnidentifiedImageError) and not _has_known_signature(data):
        raise BadImageError(
            "not_an_image",
            f"the file of {len(data)} bytes is none of {', '.join(_FORMATS)} (it starts with {data[:12]!r}); "
            "convert it to one of them or remove the samples that name it",
        ) from error
    raise BadImageError(
        "unreadable", f"the image file of {len(data)} bytes is damaged ({details}); copy, download or convert it again"
    ) from error


def _has_known_signature(data: bytes) -> bool:
    return data.startswith(_SIGNATURES) or data[8:12] == b"WEBP" or data[4:12] == b"ftypavif"


def _is_cut_short(data: bytes, error: Exception) -> bool:
    """Return whether a file that could not be decoded ends earlier than its format says."""
    if "truncated" in str(error).lower():
        return True
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    # Some programs append zeros or line ends after the end marker.
    tail = data[-64:].rstrip(b"\0\r\n ")
    return any(data.startswith(start) and not tail.endswith(end) for start, end in _END_MARKERS.items())


class _PillowWarnings:
    """Warning filters that silence Pillow on odd files and turn its decompression bomb warning into an error.

    Python's warning filters belong to the process. The first thread to enter sets them, and the last to leave restores
    them. If each thread did both, a thread could restore filters that another had set, and silence Pillow for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._saved_filters = warnings.catch_warnings()

    @contextmanager
    def tamed(self) -> Iterator[None]:
        with self._lock:
            if self._num_inside == 0:
                self._saved_filters = warnings.catch_warnings()
                self._saved_filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
                warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if self._num_inside == 0:
                    self._saved_filters.__exit__(None, None, None)


_pillow_warnings = _PillowWarnings()
