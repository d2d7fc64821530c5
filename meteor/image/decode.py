"""Decoding of image files to RGB as a viewer shows them; unusable files get a reason code."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NoReturn

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from meteor.errors import BadImageError, SettingsError
from meteor.image.byte_budget import ByteBudget
from meteor.image.pillow import pillow_settings
from meteor.image.png import PNG, without_metadata
from meteor.image.shown import orientation, to_rgb, turn
from meteor.image.webp import webp_canvas

# A closed list, because other plugins of Pillow start programs (EPS) or guess without a signature (TGA).
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
# Formats whose size is in the first bytes of a file.
_HEADER_FORMATS = ("JPEG", "PNG", "GIF", "BMP")
_ORIENTATION_KEYS = {"exif", "xmp", "XML:com.adobe.xmp"}
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of TIFF
# EXIF orientations that exchange width and height.
_QUARTER_TURNS = (5, 6, 7, 8)
_SIGNATURES = (b"\xff\xd8\xff", PNG, b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ")
# By the first two bytes of a file, or by its format.
_SUFFIXES: dict[bytes | str, str] = {
    b"\xff\xd8": ".jpg",
    PNG[:2]: ".png",
    b"GI": ".gif",
    b"BM": ".bmp",
    b"II": ".tif",
    b"MM": ".tif",
    b"\0\0": ".jp2",
    "WEBP": ".webp",
    "AVIF": ".avif",
}
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

# Most bytes per pixel while an image is decoded, measured by `benchmarks/decode_memory.py` and rounded up. The decoders of
# these formats keep coefficients, frames or strips of their own; elsewhere the peak is an image beside its copy in RGB.
_BYTES_PER_PIXEL = {"JPEG": 13, "MPO": 13, "PPM": 14, "TIFF": 16, "AVIF": 16, "WEBP": 20, "JPEG2000": 28}
_OTHER_BYTES_PER_PIXEL = 10
# Memory of all images that this process decodes at the same time: JPEG files of 80 million pixels.
_DECODING = ByteBudget(1 << 30)


def decode_image(data: bytes, *, max_pixels: int) -> Image.Image:
    """Decode an image file to RGB, oriented and coloured as a viewer shows it; see `decoded`."""
    with decoded(data, max_pixels=max_pixels) as image:
        return image


@contextmanager
def decoded(data: bytes, *, max_pixels: int) -> Iterator[Image.Image]:
    """Decode an image file to RGB, oriented and coloured as a viewer shows it, for use in a block.

    EXIF orientation is applied. Transparency is laid over white. An animation gives its first frame. Greyscale with more
    than 8 bits is scaled to 8 bits. Colour profiles are not applied, as in CLIP's and LLaVA's own preprocessing.

    The images that threads decode at the same time share a budget of memory. A thread waits until the others leave enough
    for the pixels that the image's header announces. It gives its part back at the end of the block, in which no other
    image may be decoded.

    Args:
        data: bytes of the file (JPEG, PNG, GIF, WebP, BMP, TIFF, PPM, JPEG 2000 or AVIF).
        max_pixels: most pixels (width x height) of an image, checked in the header before anything is decoded.

    Yields:
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
    with ExitStack() as stack:
        with _refusals(data, max_pixels), pillow_settings.tamed(max_pixels), _open(data, max_pixels) as image:
            stack.enter_context(_DECODING.hold(_needed_bytes(image) + len(data)))
            image.load()
            rgb, exif_orientation = to_rgb(image), orientation(image)
            # Turning makes another copy, so the memory of the first goes back before it.
            image.close()
        yield turn(rgb, exif_orientation)


def read_size(header: bytes, *, max_pixels: int) -> tuple[int, int] | None:
    """Return (width, height) as displayed from the first bytes of a file; None if they do not tell.

    Raises:
        BadImageError: the image has more than ``max_pixels`` pixels.
    """
    try:
        with pillow_settings.tamed(max_pixels), Image.open(io.BytesIO(header), formats=_HEADER_FORMATS) as image:
            _check_num_pixels(*image.size, max_pixels)
            # Pillow decodes a whole PNG when it looks for EXIF data, as these may follow the pixels.
            turned = orientation(image) in _QUARTER_TURNS if _ORIENTATION_KEYS & image.info.keys() else False
            return (image.height, image.width) if turned else image.size
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(max_pixels, error) from error
    except (OSError, ValueError, SyntaxError, struct.error):
        return None


def image_suffix(data: bytes) -> str:
    """Return the usual ending of a file with these bytes, such as ".jpg"; ".img" if they are of no known format."""
    kind = "WEBP" if data[8:12] == b"WEBP" else "AVIF" if data[4:12] == b"ftypavif" else ""
    return _SUFFIXES.get(kind or data[:2], ".img")


def _open(data: bytes, max_pixels: int) -> Image.Image:
    data = without_metadata(data) if data.startswith(PNG) else data
    if size := webp_canvas(data):
        # Pillow's decoder allocates the canvas of an animation when it opens the file.
        _check_num_pixels(*size, max_pixels)
    # Pillow knows AVIF only from version 11.3, and raises KeyError for the name of an unknown format.
    Image.init()
    image = Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
    _check_num_pixels(*image.size, max_pixels)
    return image


def _needed_bytes(image: Image.Image) -> int:
    num_pixels = image.width * image.height
    if isinstance(image, TiffImageFile):
        # The decoder allocates a whole tile, which can be larger than the image.
        num_pixels = max(num_pixels, image.tag_v2.get(_TILE_WIDTH, 0) * image.tag_v2.get(_TILE_LENGTH, 0))
    return num_pixels * _BYTES_PER_PIXEL.get(str(image.format), _OTHER_BYTES_PER_PIXEL)


def _check_num_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(
            "too_many_pixels",
            f"the image is {width}x{height}, {width * height} pixels, and the limit is {max_pixels}; "
            "make it smaller or raise max_pixels",
        )


@contextmanager
def _refusals(data: bytes, max_pixels: int) -> Iterator[None]:
    """Raise Pillow's errors as `BadImageError`."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(max_pixels, error) from error
    except _DECODING_ERRORS as error:
        _refuse(data, error)


def _too_many_pixels(max_pixels: int, error: Exception) -> BadImageError:
    return BadImageError(
        "too_many_pixels",
        f"the image announces more than twice the limit of {max_pixels} pixels ({error}); make it smaller or raise "
        "max_pixels",
    )


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
