"""Large files that are written piece by piece and read in parts, on local disk and on S3."""

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
    """Yield a local path to write to; the file appears at ``uri`` when the block ends, and never if the block fails."""
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
    """Open a file for reading in parts: a local file is mapped into memory, an object on S3 is read by byte ranges.

    Raises:
        NotFoundError: the file does not exist.
    """
    if uri.startswith("s3://"):
        # Parquet's reader asks for many small ranges; the buffer turns them into requests of 1 MiB.
        return pa.PythonFile(io.BufferedReader(_Ranges(uri), 1 << 20), mode="r")
    # Raises the library's own error when the file does not exist.
    storage.stat(uri)
    return pa.memory_map(storage.absolute(uri))


class _Ranges(io.RawIOBase):
    """An S3 object as a readable file with a position; every read is a request for a byte range."""

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
