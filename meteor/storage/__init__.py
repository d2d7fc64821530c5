"""Files and objects by URI, a local path or s3://bucket/key: the only door to boto3 and to pyarrow's file systems.

Every write appears whole or not at all. The usual AWS_* variables and profiles configure S3, AWS_ENDPOINT_URL and
AWS_REGION included. A URI names one file; folders exist only as prefixes of names, on local disk too. Every request is
tried a bounded number of times; the error after the last one names the URI.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from meteor.errors import NotFoundError, StorageError
from meteor.storage.local import LocalFile, disk_errors, partial_file
from meteor.storage.place import ObjectInfo, Place
from meteor.storage.s3 import S3Object
from meteor.storage.s3_errors import s3_errors

__all__ = [
    "ObjectInfo",
    "absolute",
    "create_bytes",
    "delete",
    "delete_leftovers",
    "download_file",
    "exists",
    "join",
    "json_bytes",
    "list_objects",
    "now_s",
    "read_bytes",
    "read_json",
    "read_range",
    "read_range_into",
    "stat",
    "upload_file",
    "write_bytes",
    "write_json",
]


def absolute(uri: str) -> str:
    """The URI that means the same from any working directory: local paths expanded, s3 without a trailing slash."""
    return uri.rstrip("/") if _is_s3(uri) else os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *parts: str) -> str:
    """``uri`` with ``parts`` below it; a part may hold slashes itself."""
    below = [part.strip("/") for part in parts]
    return "/".join([uri.rstrip("/"), *below]) if _is_s3(uri) else os.path.join(uri, *below)


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises NotFoundError if there is none."""
    with _at(uri) as place:
        return place.read()


def read_range(uri: str, start: int, size_bytes: int) -> bytes:
    """``size_bytes`` bytes from ``start`` on; see `read_range_into`."""
    buffer = bytearray(size_bytes)
    read_range_into(uri, start, buffer)
    return bytes(buffer)


def read_range_into(uri: str, start: int, buffer: bytearray | memoryview) -> None:
    """Fill ``buffer`` with the file's bytes from ``start`` on, without a copy in between.

    Raises:
        NotFoundError: there is no such file.
        StorageError: the file ends inside the range.
    """
    if not len(buffer):
        return
    with _at(uri) as place:
        num_read = place.read_into(start, memoryview(buffer))
    if num_read != len(buffer):
        raise StorageError(
            f"{uri} ends {len(buffer) - num_read} bytes before the end of the range [{start}, {start + len(buffer)}): "
            "the file was cut short, or the range belongs to another file"
        )


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write the file, replacing what was there; a reader sees the old content or the new, never half."""
    with _at(uri) as place:
        place.write(data)


def create_bytes(uri: str, data: bytes) -> None:
    """Write the file only if there is none: of several writers exactly one succeeds.

    On S3 a put whose answer was lost is sent again and can lose against itself: who gets AlreadyExistsError must look
    at what is there before concluding that somebody else wrote it.

    Raises:
        AlreadyExistsError: there was one already.
        StorageError: the store does not obey conditional puts, so that two writers could both succeed.
    """
    with _at(uri) as place:
        place.create(data)


def read_json(uri: str) -> Any:
    """The file's JSON value. Raises StorageError if it holds none."""
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{uri} does not hold valid JSON ({error}); restore or delete it") from error


def write_json(uri: str, value: Any) -> None:
    """Write ``value`` as JSON (see `json_bytes`)."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """``value`` as readable JSON without NaN, keys sorted: equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def upload_file(local_path: str, uri: str) -> None:
    """Copy a local file to ``uri``, replacing what was there."""
    if not os.path.isfile(local_path):
        raise NotFoundError(f"{local_path} is not there to be copied to {uri}")
    with _at(uri) as place:
        place.upload(local_path)


def download_file(uri: str, local_path: str) -> None:
    """Copy ``uri`` to a local path, which appears when it is complete."""
    target = absolute(local_path)
    with _at(uri) as place, partial_file(target) as partial:
        place.download(partial)
        os.replace(partial, target)


def stat(uri: str) -> ObjectInfo:
    """Size and etag. Raises NotFoundError if there is no such file (a folder is none)."""
    with _at(uri) as place:
        return place.stat()


def exists(uri: str) -> bool:
    """Whether there is a file of exactly this name; False for a folder."""
    try:
        stat(uri)
    except NotFoundError:
        return False
    return True


def delete(uri: str) -> None:
    """Delete the file; absent is fine."""
    with _at(uri) as place:
        place.delete()


def list_objects(prefix_uri: str) -> list[ObjectInfo]:
    """All files below the folder, recursively, sorted by URI; none when it is absent. Unfinished writes never show."""
    with _at(prefix_uri) as place:
        return sorted(place.list(), key=lambda info: info.uri)


def delete_leftovers(prefix_uri: str, older_than_s: float, dry_run: bool) -> list[str]:
    """Delete what broken-off writes below the folder left: partial files, unfinished multi-part uploads.

    No listing shows them, but they cost space.

    Args:
        prefix_uri: a folder; absent is fine.
        older_than_s: keep what is younger, by the clock of `now_s`: it may belong to a write that is going on.
        dry_run: only say what would be deleted.

    Returns:
        Their URIs, sorted; an upload's ends in ``?uploadId=...``.
    """
    with _at(prefix_uri) as place:
        return sorted(place.leftovers(older_than_s, dry_run))


def now_s(uri: str) -> float:
    """The time in epoch seconds by the clock that `ObjectInfo.modified_s` is measured with: on S3 the store's."""
    with _at(uri) as place:
        return place.now_s()


def _is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


@contextmanager
def _at(uri: str) -> Iterator[Place]:
    if "://" in uri and not _is_s3(uri):
        raise StorageError(f"{uri}: only local paths and s3:// are supported")
    if _is_s3(uri):
        # In this order: some of boto3's errors are the operating system's as well.
        with disk_errors(uri), s3_errors(uri):
            yield S3Object(absolute(uri))
    else:
        with disk_errors(uri):
            yield LocalFile(absolute(uri))
