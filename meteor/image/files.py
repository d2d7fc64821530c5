"""Image files as bytes, up to a size that no image within the limit of pixels has; an image may lie inside a data file."""

import json
from dataclasses import replace

from meteor import storage
from meteor.errors import BadImageError, DamagedError, InaccessibleError
from meteor.image.inside import Place, file_of, find_place, image_at

# Room for 178,956,970 pixels, the default limit, of four channels of 16 bits without compression, and for metadata.
MAX_FILE_BYTES = 2 << 30


def read_image_file(uri: str) -> bytes:
    """Read the bytes of an image file, or of an image inside a data file (`meteor.image.inside`).

    Raises:
        NotFoundError: the file does not exist.
        InaccessibleError: the file cannot be read, or has more than `MAX_FILE_BYTES`.
        BadImageError: the data file does not hold the image, or is damaged there.
    """
    place = find_place(uri)
    return storage.read_bytes(uri, max_bytes=MAX_FILE_BYTES) if place is None else _read_inside(place)


def read_image_start(uri: str, num_bytes: int) -> bytes:
    """Read the first bytes of an image; for errors see `read_image_file`."""
    place = find_place(uri)
    if place is None:
        return storage.read_range(uri, 0, min(num_bytes, storage.stat(uri).size_bytes))
    if place.column or file_of(uri).endswith(("json", "jsonl")):
        return _read_inside(place)[:num_bytes]
    return _read_range(place, min(num_bytes, place.size_bytes))


def image_size_bytes(uri: str) -> int:
    """Return the number of bytes to read for an image, if it is known before reading; for a cell of Parquet it is 0."""
    place = find_place(uri)
    return storage.stat(uri).size_bytes if place is None else place.size_bytes


def stat_image(uri: str) -> storage.ObjectInfo:
    """Return the state of an image: that of its file. Raises NotFoundError if the file does not exist."""
    return at_image(storage.stat(file_of(uri)), uri)


def at_image(info: storage.ObjectInfo, uri: str) -> storage.ObjectInfo:
    """Return the state of an image inside a file with this state."""
    return info if info.uri == uri else replace(info, uri=uri)


def _read_inside(place: Place) -> bytes:
    if place.column:
        # Arrow's reader of Parquet takes 40 MB, which processes that read image files save.
        from meteor.image.parquet_cells import read_cell

        return image_at(read_cell(place.file, place.column, place.start), place.column, place)
    if place.size_bytes > MAX_FILE_BYTES:
        raise InaccessibleError(
            f"an image in {place.file} has {place.size_bytes:,} bytes; at most {MAX_FILE_BYTES:,} are read"
        )
    data = _read_range(place, place.size_bytes)
    if place.file.endswith(".tar"):
        return data
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadImageError(
            "changed", f"{place.file} has changed since it was read; run cache_features again"
        ) from error
    return image_at(record, "", place)


def _read_range(place: Place, size_bytes: int) -> bytes:
    try:
        return storage.read_range(place.file, place.start, size_bytes)
    except DamagedError as error:
        raise BadImageError("truncated", f"{error}; copy or download it again") from error
