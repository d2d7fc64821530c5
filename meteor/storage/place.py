"""What storage knows of one file or object, on whatever it lies."""

import math
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

# Names that begin so are unfinished or passing; a listing never shows them, `delete_leftovers` removes them.
PARTIAL_PREFIX = ".partial-"


@dataclass(frozen=True)
class ObjectInfo:
    """One file or object.

    Attributes:
        etag: changes when the content does (the modification time in ns on local disk).
        modified_s: when it was written, in epoch seconds of the clock that `now_s` reads. Not part of equality: S3 tells
            milliseconds in a listing and seconds elsewhere. Not known (nan) is older than nothing.
    """

    uri: str
    size_bytes: int
    etag: str
    modified_s: float = field(default=math.nan, compare=False)


class Place(Protocol):
    """What local files and S3 objects can both do; `meteor.storage` says what each means."""

    def read(self) -> bytes: ...
    def read_into(self, start: int, buffer: memoryview) -> int: ...
    def write(self, data: bytes | memoryview) -> None: ...
    def create(self, data: bytes) -> None: ...
    def upload(self, source: str) -> None: ...
    def download(self, target: str) -> None: ...
    def stat(self) -> ObjectInfo: ...
    def delete(self) -> None: ...
    def list(self) -> Iterator[ObjectInfo]: ...
    def leftovers(self, older_than_s: float, dry_run: bool) -> Iterator[str]: ...
    def now_s(self) -> float: ...


def partial_name() -> str:
    """A name that nothing has and no listing shows."""
    return f"{PARTIAL_PREFIX}{uuid.uuid4().hex}"


def is_partial(path: str) -> bool:
    """Whether the last part of a path or key is such a name."""
    return os.path.basename(path).startswith(PARTIAL_PREFIX)
