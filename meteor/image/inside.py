"""Images inside data files: the URI of each, and its place in a record.

The URI is the file's with a fragment:

- ``shard.parquet#000000017/images/0``: row 17, column ``images``, the first image in its value;
- ``shard.tar#000000001536+20480``: 20,480 bytes from byte 1,536 on, the content of a member;
- ``samples.jsonl#000000000120+9000/0``: the record of 9,000 bytes at byte 120, and its first image that is a data: URI.

Numbers are padded, so that names in alphabetical order are in the order of the file, which is the fast way to read them.
"""

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from meteor.errors import BadImageError

# Keys whose texts name images; a text of a dialogue that only looks like a data: URI is under another key.
_NAMING_KEYS = {"image", "images", "image_path", "image_paths", "image_url", "url", "path"}
_URI = re.compile(
    r"(?P<file>.+\.(?:parquet(?=#\d{9,}/\w)|tar(?=#\d{12,}\+\d+$)|jsonl?(?=#\d{12,}\+\d+/\d+$)))"
    r"#(?P<start>\d+)(?:\+(?P<size_bytes>\d+))?(?:/(?P<column>\w+(?=/)))?(?:/(?P<position>\d+))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Place:
    """Place of an image inside a file.

    Attributes:
        file: URI of the file.
        start: row of a Parquet file, else the offset in bytes.
        size_bytes: size of a member or of a record; 0 in Parquet.
        column: column of a Parquet file, else "".
        position: number of the image in the value of the column or in the record, from 0.
    """

    file: str
    start: int
    size_bytes: int = 0
    column: str = ""
    position: int = 0


def find_place(uri: str) -> Place | None:
    """Return the place that a URI names; None for the URI of an image file."""
    found = _URI.fullmatch(uri) if "#" in uri else None
    if found is None:
        return None
    return Place(
        found["file"],
        int(found["start"]),
        int(found["size_bytes"] or 0),
        found["column"] or "",
        int(found["position"] or 0),
    )


def file_of(uri: str) -> str:
    """Return the URI of the file that holds an image: its own, or that of the data file around it."""
    place = find_place(uri)
    return uri if place is None else place.file


def cell_fragment(row: int, column: str, position: int) -> str:
    """Return the fragment of an image in a Parquet file."""
    return f"#{row:09d}/{column}/{position}"


def member_fragment(start: int, size_bytes: int) -> str:
    """Return the fragment of a member of a tar archive."""
    return f"#{start:012d}+{size_bytes}"


def record_fragment(start: int, size_bytes: int, position: int) -> str:
    """Return the fragment of a data: URI in a record of a JSON file."""
    return f"#{start:012d}+{size_bytes}/{position}"


def map_images(value: Any, change: Callable[[Any], Any], key: str = "") -> Any:
    """Return a value in which every image is replaced.

    An image is a dict with nothing but ``bytes`` and ``path``, as the hub's data sets store it, or bytes, or a data: URI under
    a key that names images.

    Args:
        value: JSON values, or those of an Arrow column.
        change: function from an image to the value in its place, called in the order of the record.
        key: key under which the value stands.
    """
    if isinstance(value, list):
        return [map_images(item, change, key) for item in value]
    if isinstance(value, dict):
        if value and value.keys() <= {"bytes", "path"}:
            return change(value)
        return {name: map_images(item, change, name) for name, item in value.items()}
    is_image = isinstance(value, bytes) or (isinstance(value, str) and key in _NAMING_KEYS and is_data_uri(value))
    return change(value) if is_image else value


def is_data_uri(text: str) -> bool:
    """Return whether a text is a data: URI."""
    return text[:5].lower() == "data:"


def image_at(value: Any, key: str, place: Place) -> bytes:
    """Return the bytes of the image at a place in the value that holds it.

    Raises:
        BadImageError: there is no such image, it has no bytes, or its base64 is damaged.
    """
    images: list[Any] = []
    map_images(value, images.append, key)
    if place.position >= len(images):
        raise BadImageError("changed", f"{place.file} has changed since it was read; run cache_features again")
    image = images[place.position]
    data = image.get("bytes") if isinstance(image, dict) else image
    if data is None:
        raise BadImageError(
            "empty", f"an image in {place.file} has no bytes and no path; remove the samples that show it"
        )
    if isinstance(data, str):
        return decode_data_uri(data)
    if not isinstance(data, bytes):
        raise BadImageError("not_an_image", f"an image in {place.file} is a {type(data).__name__}, not bytes")
    return data


def decode_data_uri(text: str) -> bytes:
    """Return the content of a data: URI (RFC 2397). Raises BadImageError if it is damaged."""
    header, comma, content = text.partition(",")
    try:
        if not comma or not is_data_uri(header):
            raise ValueError("it has no content")
        if header.lower().endswith(";base64"):
            return base64.b64decode("".join(content.split()), validate=True)
        return unquote_to_bytes(content)
    except (ValueError, binascii.Error) as error:
        raise BadImageError("unreadable", f"an image is no valid data: URI ({error}); write it again") from error
