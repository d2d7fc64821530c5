"""The first operator of the encoding pass: tasks that read and slice images.

The module imports neither transformers nor the encoder: its tasks run in a process on every CPU of the cluster, and each
process would spend seconds and hundreds of megabytes on those imports.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from meteor import storage
from meteor.errors import BadImageError, NotFoundError
from meteor.image.pixels import PixelSettings, slice_bytes

_NUM_READERS = 8
_SLICED_SCHEMA = pa.schema(
    [
        ("image_key", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        # Of all sub-images; which is which follows from the size. More than 2 GB may come together.
        ("pixels", pa.large_binary()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)


def slice_batch(batch: pa.Table, pixels: PixelSettings) -> pa.Table:
    """Read and slice images; one that cannot be becomes a row with a reason.

    Args:
        batch: columns ``image_key`` and ``uri``.
        pixels: slicing and limits.
    """
    keys, uris = batch["image_key"].to_pylist(), batch["uri"].to_pylist()
    rows = []
    # Object stores answer late: the next images are on their way while one is decoded.
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        reads = [pool.submit(read_unchanged, uri, key) for uri, key in zip(uris, keys, strict=True)]
        for key, read in zip(keys, reads, strict=True):
            row: dict[str, Any] = {
                "image_key": key,
                "reason": "",
                "message": "",
                "pixels": b"",
                "width": 0,
                "height": 0,
            }
            try:
                image = slice_bytes(read.result(), key, pixels)
                row |= {"width": image.width, "height": image.height, "pixels": image.to_bytes()}
            except BadImageError as error:
                row |= {"reason": error.reason, "message": str(error)}
            rows.append(row)
    return pa.Table.from_pylist(rows, schema=_SLICED_SCHEMA)


def read_unchanged(uri: str, image_key: str) -> bytes:
    """The image's bytes. Raises BadImageError when they are gone or others than were indexed."""
    try:
        data = storage.read_bytes(uri)
    except NotFoundError as error:
        raise BadImageError("missing", f"{uri} was indexed and is gone") from error
    if hashlib.sha256(data).hexdigest() != image_key:
        raise BadImageError("changed", f"{uri} has changed since it was indexed; run cache_features again")
    return data
