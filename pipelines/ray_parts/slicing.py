"""First operator of the encoding pass: tasks that read and slice images.

The module imports neither transformers nor the encoder. Its tasks run in a process on every CPU of the cluster, and each
process would spend seconds and hundreds of megabytes on those imports.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from meteor.data.image_problems import image_problems
from meteor.errors import BadImageError
from meteor.image.files import read_image_file
from meteor.image.pixels import PixelSettings, slice_bytes

_NUM_READERS = 8
_SLICED_SCHEMA = pa.schema(
    [
        ("image_key", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        # Pixels of all sub-images, whose places follow from the image's size; large, as a batch may have more than 2 GB.
        ("pixels", pa.large_binary()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)


def slice_batch(batch: pa.Table, pixels: PixelSettings) -> pa.Table:
    """Read and slice images; an image that cannot be used becomes a row with a reason.

    Args:
        batch: table with the columns ``image_key`` and ``uri``.
        pixels: slicing settings and limits.
    """
    rows = []
    for key, uri, read in _reads(batch["image_key"].to_pylist(), batch["uri"].to_pylist()):
        row: dict[str, Any] = {
            "image_key": key,
            "reason": "",
            "message": "",
            "pixels": b"",
            "width": 0,
            "height": 0,
        }
        try:
            with image_problems(uri):
                image = slice_bytes(read.result(), key, pixels)
                row |= {"width": image.width, "height": image.height, "pixels": image.to_bytes()}
        except BadImageError as error:
            row |= {"reason": error.reason, "message": str(error)}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=_SLICED_SCHEMA)


def _reads(keys: list[str], uris: list[str]) -> Iterator[tuple[str, str, Future[bytes]]]:
    """Yield (image key, URI, read of its file), while the next files are read; object stores have a high latency.

    Only a few files are in memory at a time, because a file can be as large as `meteor.image.files.MAX_FILE_BYTES`.
    """
    waiting: deque[tuple[str, str, Future[bytes]]] = deque()
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        for key, uri in zip(keys, uris, strict=True):
            if len(waiting) == _NUM_READERS:
                yield waiting.popleft()
            waiting.append((key, uri, pool.submit(read_unchanged, uri, key)))
        while waiting:
            yield waiting.popleft()


def read_unchanged(uri: str, image_key: str) -> bytes:
    """Read an image's bytes; raise BadImageError if the file cannot be read or has changed since it was indexed."""
    with image_problems(uri):
        data = read_image_file(uri)
    if hashlib.sha256(data).hexdigest() != image_key:
        raise BadImageError("changed", f"{uri} has changed since it was indexed; run cache_features again")
    return data
