"""Facts about an image for the dataset index, read from its file.

The module imports no torch, as `read_image` runs in a process on every CPU of the cluster and needs Pillow alone.
"""

import hashlib
from typing import Any

from meteor import storage
from meteor.errors import BadImageError
from meteor.image.decode import decode_image


def read_image(row: dict[str, str], *, max_pixels: int) -> dict[str, Any]:
    """Read, hash and decode an image.

    Args:
        row: ``name`` and ``uri`` of the image.
        max_pixels: number of pixels above which an image is bad.

    Returns:
        Fields of an `IndexRow`.
    """
    info = storage.stat(row["uri"])
    data = storage.read_bytes(row["uri"])
    fields = {"name": row["name"], "uri": row["uri"], "size_bytes": info.size_bytes, "etag": info.etag}
    fields["image_key"] = hashlib.sha256(data).hexdigest()
    try:
        image = decode_image(data, max_pixels=max_pixels)
    except BadImageError as error:
        return {**fields, "width": 0, "height": 0, "status": "bad", "reason": error.reason}
    return {**fields, "width": image.width, "height": image.height, "status": "ok", "reason": ""}
