"""The interface that local files and S3 objects share, and the description of one file."""

import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from meteor.errors import InaccessibleError

# Names with this prefix are unfinished or temporary; a listing never shows them, and `delete_leftovers` removes them.
PARTIAL_PREFIX = ".partial-"


@dataclass(frozen=True)
class ObjectInfo:
    """Description of a file or object.

    Attributes:
        uri: the file's URI.
        size_bytes: number of bytes.
        etag: text that changes when the content does; on local disk the times of the last modification and of the last
            change of the inode, in ns. A program can set the first back, and only the kernel sets the second.
        modified_s: time of the last write, in epoch seconds of the clock that `now_s` reads; nan if it is not known. It
            is not part of equality, because S3 gives milliseconds in a listing and seconds elsewhere.
        copied_etag: the part of the etag that a copy with its times keeps; on local disk the modification time in ns, on S3
            the etag. It names a model in the identity of a run, which must survive a move to another disk.
    """

    uri: str
    size_bytes: int
    etag: str
    modified_s: float = field(default=math.nan, compare=False)
    copied_etag: str = field(default="", compare=False)


class Place(Protocol):
    """Operations of local files and of S3 objects; the functions of `meteor.storage` describe them."""

    def read(self, max_bytes: int | None) -> bytes: ...
    def read_into(self, start: int, buffer: memoryview) -> int: ...
    def write(self, data: bytes | memoryview) -> None: ...
    def create(self, data: bytes) -> None: ...
    def upload(self, source: str) -> None: ...
    def download(self, target: str) -> None: ...
    def stat(self) -> ObjectInfo: ...
    def delete(self) -> None: ...
    def list(self) -> Iterator[ObjectInfo]: ...
    def delete_empty_folders(self) -> None: ...
    def leftovers(self, older_than_s: float, dry_run: bool) -> Iterator[str]: ...
    def now_s(self) -> float: ...


def check_size(uri: str, size_bytes: int, max_bytes: int | None) -> None:
    """Refuse a file that is larger than its reader expects. Raises InaccessibleError."""
    if max_bytes is not None and size_bytes > max_bytes:
        raise InaccessibleError(
            f"{uri} has {size_bytes} bytes, and at most {max_bytes} are read into memory: it is not the kind of file that "
            "is expected here, or damaged; replace it"
        )


def partial_name() -> str:
    """Return a new, unused name that no listing shows."""
    return f"{PARTIAL_PREFIX}{uuid.uuid4().hex}"


def is_partial(path: str) -> bool:
    """Return whether the last part of a path or key is the name of an unfinished file."""
    return os.path.basename(path).startswith(PARTIAL_PREFIX)
