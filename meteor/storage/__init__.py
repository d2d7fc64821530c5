"""Files and objects by URI, a local path or s3://bucket/key: the only package that uses boto3.

Every write appears whole or not at all. The usual AWS_* variables and profiles configure S3, including AWS_ENDPOINT_URL
and AWS_REGION. A URI names one file; folders exist only as prefixes of names, on local disk too. Every request is tried
a bounded number of times; the error after the last attempt names the URI.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from meteor.errors import DamagedError, NotFoundError, StorageError, UnsafeNameError
from meteor.formatting import shorten
from meteor.home import expand_home
from meteor.storage.local import LocalFile, disk_errors, partial_file
from meteor.storage.place import ObjectInfo, Place
from meteor.storage.s3 import S3Object
from meteor.storage.s3_errors import s3_errors

__all__ = [
    "ObjectInfo",
    "absolute",
    "check_range",
    "create_bytes",
    "delete",
    "delete_empty_folders",
    "delete_leftovers",
    "download_file",
    "exists",
    "join",
    "join_below",
    "json_bytes",
    "list_objects",
    "now_s",
    "parent",
    "read_bytes",
    "read_json",
    "read_range",
    "read_range_into",
    "stat",
    "upload_file",
    "write_bytes",
    "write_json",
]


_DRIVE = re.compile(r"[A-Za-z]:")
# Limits of Linux for one part of a path, and of S3 for a whole key.
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 1024
_LONGEST_SHOWN = 100
# Ranges up to this size are read at once, because a look at the file's size is a request on S3.
_UNCHECKED_RANGE_BYTES = 64 << 20


def absolute(uri: str) -> str:
    """Return the URI in a form that no working directory changes; an s3 URI loses its trailing slash."""
    return uri.rstrip("/") if _is_s3(uri) else os.path.abspath(expand_home(uri))


def join(uri: str, *parts: str) -> str:
    """Append ``parts`` to ``uri`` as folders or names; a part may contain slashes."""
    below = [part.strip("/") for part in parts]
    return "/".join([uri.rstrip("/"), *below]) if _is_s3(uri) else os.path.join(uri, *below)


def parent(uri: str) -> str:
    """Return the URI of the folder that holds a file."""
    return uri.rpartition("/")[0]


def join_below(uri: str, name: str) -> str:
    """Append a name that comes from data (a table, an archive, the key of an object) and that must stay below ``uri``.

    Args:
        uri: folder, local or s3://.
        name: relative name, possibly with slashes; "." and empty parts are dropped.

    Raises:
        UnsafeNameError: the name is empty or absolute, has a part "..", a drive, a NUL or half of a surrogate pair, or is too
            long for a file system.
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if problem := _why_unsafe(name, parts):
        raise UnsafeNameError(
            f"{shorten(name, _LONGEST_SHOWN)!r} {problem}, so it names no file below {uri}: the data that holds it is not "
            "to be trusted"
        )
    return join(uri, *parts)


def _why_unsafe(name: str, parts: list[str]) -> str:
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError:
        return "has half of a surrogate pair"
    if not parts:
        return "is empty"
    if name.startswith(("/", "~")) or "://" in name:
        return "is absolute"
    if ".." in parts:
        return "leads out of its folder"
    if _DRIVE.match(name) or "\0" in name:
        return "has a drive or a NUL"
    return "is too long" if max(sizes) > _MAX_NAME_BYTES or sum(sizes) + len(sizes) > _MAX_PATH_BYTES else ""


def read_bytes(uri: str, *, max_bytes: int | None = None) -> bytes:
    """Read the whole file.

    Args:
        uri: URI of the file.
        max_bytes: largest size to read, compared with the size that the store announces before memory is taken; None for
            the project's own files, which have any size.

    Raises:
        NotFoundError: the file does not exist.
        InaccessibleError: the file is larger.
    """
    with _at(uri) as place:
        return place.read(max_bytes)


def read_range(uri: str, start: int, size_bytes: int) -> bytes:
    """Read ``size_bytes`` bytes from offset ``start``; see `read_range_into`."""
    check_range(uri, start, size_bytes)
    buffer = bytearray(size_bytes)
    read_range_into(uri, start, buffer)
    return bytes(buffer)


def read_range_into(uri: str, start: int, buffer: bytearray | memoryview) -> None:
    """Fill ``buffer`` with the file's bytes from offset ``start``, without a copy in between.

    Raises:
        NotFoundError: the file does not exist.
        DamagedError: the file ends inside the range.
    """
    if not len(buffer):
        # HTTP cannot express an empty range.
        return
    with _at(uri) as place:
        num_read = place.read_into(start, memoryview(buffer))
    if num_read != len(buffer):
        raise _range_error(uri, start, len(buffer), num_read)


def check_range(uri: str, start: int, size_bytes: int) -> None:
    """Check before memory is taken that a range which other data name is inside the file; small ranges are not looked up.

    Raises:
        NotFoundError: the file does not exist.
        DamagedError: the file ends inside the range, or the range is negative.
    """
    if start < 0 or size_bytes < 0:
        raise _range_error(uri, start, size_bytes, 0)
    if size_bytes > _UNCHECKED_RANGE_BYTES and (left := stat(uri).size_bytes - start) < size_bytes:
        raise _range_error(uri, start, size_bytes, max(left, 0))


def _range_error(uri: str, start: int, size_bytes: int, num_there: int) -> DamagedError:
    return DamagedError(
        f"{uri} ends {size_bytes - num_there} bytes before the end of the range [{start}, {start + size_bytes}): "
        "the file was cut short, or the range belongs to another file"
    )


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write the file and replace an earlier one; a reader sees the old content or the new, never a mixture."""
    with _at(uri) as place:
        place.write(data)


def create_bytes(uri: str, data: bytes) -> None:
    """Write the file only if it does not exist; exactly one of several writers succeeds.

    On S3 a put whose answer was lost is sent again, and can find the object that its first attempt wrote. After
    AlreadyExistsError the caller must therefore read the object before it concludes that another writer wrote it.

    Raises:
        AlreadyExistsError: the file existed already.
        StorageError: the store does not obey conditional puts, or the file system has no move that spares an existing file,
            so two writers could both succeed.
    """
    with _at(uri) as place:
        place.create(data)


def read_json(uri: str) -> Any:
    """Read the JSON value of a file. Raises DamagedError if the file is not JSON."""
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{uri} does not hold valid JSON ({error}); restore or delete it") from error


def write_json(uri: str, value: Any) -> None:
    """Write ``value`` as JSON (see `json_bytes`)."""
    write_bytes(uri, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Encode ``value`` as readable JSON with sorted keys, so that equal values give equal bytes; NaN is refused."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def upload_file(local_path: str, uri: str) -> None:
    """Copy a local file to ``uri`` and replace an earlier file there."""
    if not os.path.isfile(local_path):
        raise NotFoundError(f"{local_path} does not exist and cannot be copied to {uri}")
    with _at(uri) as place:
        place.upload(local_path)


def download_file(uri: str, local_path: str) -> None:
    """Copy ``uri`` to a local path, which appears only when the copy is complete."""
    target = absolute(local_path)
    with _at(uri) as place, partial_file(target) as partial:
        place.download(partial)
        os.replace(partial, target)


def stat(uri: str) -> ObjectInfo:
    """Return size, etag and time of a file. Raises NotFoundError if it does not exist or is a folder."""
    with _at(uri) as place:
        return place.stat()


def exists(uri: str) -> bool:
    """Return whether a file has exactly this name; False for a folder."""
    try:
        stat(uri)
    except NotFoundError:
        return False
    return True


def delete(uri: str) -> None:
    """Delete the file if it exists."""
    with _at(uri) as place:
        place.delete()


def list_objects(prefix_uri: str) -> list[ObjectInfo]:
    """List all files below the folder, recursively, sorted by URI, without unfinished writes.

    The list is empty when the folder does not exist.
    """
    with _at(prefix_uri) as place:
        return sorted(place.list(), key=lambda info: info.uri)


def delete_leftovers(prefix_uri: str, older_than_s: float, dry_run: bool) -> list[str]:
    """Delete the remains of broken-off writes below the folder: partial files, unfinished multi-part uploads, empty folders.

    No listing shows these remains, but they take space.

    Args:
        prefix_uri: folder, which need not exist.
        older_than_s: least age by the clock of `now_s`; younger remains are kept, because a write may be going on.
        dry_run: only list the files that would be deleted.

    Returns:
        The URIs of the remains, sorted; the URI of an upload ends in ``?uploadId=...``, and that of an empty folder on local
        disk in a slash. A folder is as old as the last change in it, so it goes some time after its files.
    """
    with _at(prefix_uri) as place:
        return sorted(place.leftovers(older_than_s, dry_run))


def delete_empty_folders(prefix_uri: str) -> None:
    """Delete the folder and the folders in it that hold no file; on S3, where folders are parts of names, nothing."""
    with _at(prefix_uri) as place:
        place.delete_empty_folders()


def now_s(uri: str) -> float:
    """Return the time in epoch seconds by the clock that sets `ObjectInfo.modified_s`: the store's clock.

    On local disk a file is written for a moment in the folder, because a file server has a clock of its own. In a folder that
    cannot be written this machine's clock counts.
    """
    with _at(uri) as place:
        return place.now_s()


def _is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


@contextmanager
def _at(uri: str) -> Iterator[Place]:
    if "://" in uri and not _is_s3(uri):
        raise StorageError(f"{uri}: only local paths and s3:// are supported")
    if _is_s3(uri):
        # `s3_errors` is the inner context because some of boto3's errors are also OSErrors, which the outer one takes.
        with disk_errors(uri), s3_errors(uri):
            yield S3Object(absolute(uri))
    else:
        with disk_errors(uri):
            yield LocalFile(absolute(uri))
