"""Facts about an image for the dataset index, read from its file.

The module imports no torch, as `read_image` runs in a process on every CPU of the cluster and needs Pillow alone.
"""

import hashlib
from typing import Any

from meteor.data.image_problems import image_problems
from meteor.errors import BadImageError
from meteor.image.decode import decode_image
from meteor.image.files import read_image_file, stat_image


def read_image(row: dict[str, str], *, max_pixels: int) -> dict[str, Any]:
    """Read, hash and decode an image.

    Args:
        row: ``name`` and ``uri`` of the image.
        max_pixels: number of pixels above which an image is bad.

    Returns:
        Fields of an `IndexRow`.
    """
    fields = {
        "name": row["name"],
        "uri": row["uri"],
        "size_bytes": 0,
        "etag": "",
        "image_key": "",
        "width": 0,
        "height": 0,
    }
    try:
        with image_problems(row["uri"]):
            info = stat_image(row["uri"])
            data = read_image_file(row["uri"])
            fields |= {"size_bytes": info.size_bytes, "etag": info.etag, "image_key": hashlib.sha256(data).hexdigest()}
            image = decode_image(data, max_pixels=max_pixels)
    except BadImageError as error:
        return {**fields, "status": "bad", "reason": error.reason}
    return {**fields, "width": image.width, "height": image.height, "status": "ok", "reason": ""}
