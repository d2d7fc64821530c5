"""Large files that are written piece by piece and read in part, on local disk and on S3 alike."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from meteor import storage
from meteor.storage.local import disk_errors, partial_file


@contextmanager
def new_file(uri: str) -> Iterator[str]:
    """Give a local path to write to; the file appears at ``uri`` when the block ends, and not at all when it fails."""
    if uri.startswith("s3://"):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "file")
            yield path
            storage.upload_file(path, uri)
        return
    target = storage.absolute(uri)
    with disk_errors(uri), partial_file(target) as partial:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)


def open_file(uri: str) -> pa.NativeFile:
    """Open a file for reading parts of it; a local one is mapped into memory, of one on S3 ranges are asked for.

    Raises:
        NotFoundError: there is no such file.
    """
    if uri.startswith("s3://"):
        return pa.PythonFile(io.BufferedReader(_Ranges(uri), 1 << 20), mode="r")
    storage.stat(uri)
    return pa.memory_map(storage.absolute(uri))


class _Ranges(io.RawIOBase):
    """An object of the store as a file with a position."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self._uri = uri
        self._size_bytes = storage.stat(uri).size_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        view = memoryview(buffer).cast("B")
        size = max(min(len(view), self._size_bytes - self._position), 0)
        storage.read_range_into(self._uri, self._position, view[:size])
        self._position += size
        return size
