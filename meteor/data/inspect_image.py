"""Inspection of an image that an annotation file names: does it exist, can it be read, how is it sliced?"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from meteor import storage
from meteor.data.image_problems import image_problems
from meteor.data.roots import resolve_image
from meteor.data.sources import other_spelling
from meteor.errors import BadImageError, ImagePathError, StorageError
from meteor.image.byte_budget import ByteBudget
from meteor.image.decode import decoded, read_size
from meteor.image.files import image_size_bytes, read_image_file, read_image_start
from meteor.image.inside import find_place
from meteor.image.pixels import PixelSettings
from meteor.image.slicing import SlicePlan

# Enough for the size of nearly every JPEG (the EXIF block before it is at most 64 KiB) and of every PNG, GIF and BMP.
_HEADER_BYTES = 1 << 17

# Bytes of the image files that this process inspects whole at the same time.
_FILES = ByteBudget(1 << 30)


@dataclass(frozen=True)
class InspectedImage:
    """Result of an image's inspection.

    Attributes:
        name: the image's name in the samples.
        reason: "" if the image can be used; else "outside_roots", "storage", or a reason of `image_problems`.
        message: description of the problem, or "".
        plan: the image's slices, or None if it cannot be used.
        sha256: digest of the file's bytes if the whole file was read, else "".
        found_as: other name under which a missing image exists, else "".
    """

    name: str
    reason: str
    message: str
    plan: SlicePlan | None
    sha256: str = ""
    found_as: str = ""


def inspect_image(name: str, roots: Mapping[str, str], pixels: PixelSettings, *, full: bool) -> InspectedImage:
    """Inspect an image by its header alone, or with ``full`` by decoding it as for the encoder."""
    try:
        uri = resolve_image(name, roots)
        with image_problems(uri):
            size, sha256 = _read_whole(uri, pixels) if full else (_read_size(uri, pixels), "")
            return InspectedImage(name, "", "", pixels.plan(*size), sha256)
    except ImagePathError as error:
        return InspectedImage(name, "outside_roots", str(error), None)
    except BadImageError as error:
        found_as = _found_as(name, roots) if error.reason == "missing" else ""
        # The name of an image inside a file does not say which file it is.
        message = f"{uri}: {error}" if find_place(uri) and uri not in str(error) else str(error)
        return InspectedImage(name, error.reason, message, None, found_as=found_as)
    except StorageError as error:
        return InspectedImage(name, "storage", str(error), None)


def _found_as(name: str, roots: Mapping[str, str]) -> str:
    other = other_spelling(name)
    return other if other is not None and storage.exists(resolve_image(other, roots)) else ""


def _read_whole(uri: str, pixels: PixelSettings) -> tuple[tuple[int, int], str]:
    # Threads share this budget for the files themselves, and then `decoded`'s for the pixels.
    with _FILES.hold(image_size_bytes(uri)):
        return _decode_whole(read_image_file(uri), pixels)


def _decode_whole(data: bytes, pixels: PixelSettings) -> tuple[tuple[int, int], str]:
    with decoded(data, max_pixels=pixels.max_pixels) as image:
        return image.size, hashlib.sha256(data).hexdigest()


def _read_size(uri: str, pixels: PixelSettings) -> tuple[int, int]:
    """Return (width, height) as displayed, from the header if possible, else by decoding, which names any fault."""
    header = read_image_start(uri, _HEADER_BYTES)
    return read_size(header, max_pixels=pixels.max_pixels) or _read_whole(uri, pixels)[0]
