"""A node's own disk in front of S3: payloads that were read stay as files, the least recently used go first.

All processes of a node share one folder. A file's name says which bytes it holds (data files never change), so nothing goes
stale; whoever reads checks the bytes. Losing files, or the whole folder, costs time alone.
"""

import fcntl
import io
import logging
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from meteor.errors import StorageError

_LOG = logging.getLogger(__name__)
# A folder of our own inside the one that was named, and names of our own in it: nothing else is ever deleted.
_FOLDER = "meteor-features"
_OURS = re.compile(r"[0-9a-f]{32}-\d+(\.partial-[0-9a-f]{32})?")
_USED, _EVICTION = "used_bytes", "eviction.lock"
# An eviction looks at every file, so it makes room for many.
_KEPT_SHARE = 0.9
_TOUCH_AFTER_S = 60
_PAUSE_AFTER_FAILURE_S = 60


class _File(NamedTuple):
    used_at: float
    size_bytes: int
    path: str


class DiskTier:
    """Byte ranges by name, at most ``limit_bytes`` of them on disk; safe to share between threads and processes.

    The limit is kept by a running count that every eviction corrects: while one runs, files that others are just writing
    may come on top.

    Args:
        folder: on a disk of this node; made if it is not there.
        limit_bytes: what the files may take together.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        self.folder = os.path.join(os.path.abspath(os.path.expanduser(folder)), _FOLDER)
        self.limit_bytes = limit_bytes
        self._given_folder = folder
        self._warned = False
        self._write_again_at = 0.0
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.folder} cannot hold the disk tier ({error.strerror}); set cache.disk_tier to a folder on a "
                "disk of this node, or to nothing"
            ) from error

    def __reduce__(self) -> tuple[type["DiskTier"], tuple[str, int]]:
        return DiskTier, (self._given_folder, self.limit_bytes)

    def read_into(self, file_id: str, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with what was written under this name; False if that is not there (any more), or cut short.

        Args:
            file_id: the data file's unique name, 32 hexadecimal digits.
            offset: where the range begins in it.
            buffer: of the range's size.
        """
        path = self._path(file_id, offset)
        try:
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size == len(buffer) == _fill(buffer, file):
                    if time.time() - status.st_mtime > _TOUCH_AFTER_S:
                        os.utime(path)
                    return True
        except FileNotFoundError:
            return False
        except OSError as error:
            self._warn(error)
            return False
        self.drop(file_id, offset)
        return False

    def write(self, file_id: str, offset: int, data: memoryview) -> None:
        """Keep the range for later readers; without effect when the disk is full or another process makes room now."""
        if time.monotonic() < self._write_again_at:
            return
        path = self._path(file_id, offset)
        try:
            if not os.path.exists(path) and self._reserve(len(data)):
                self._publish(path, data)
        except OSError as error:
            # The folder may have been deleted, the disk may be full of other files: reading goes on from the origin.
            self._write_again_at = time.monotonic() + _PAUSE_AFTER_FAILURE_S
            self._warn(error)

    def drop(self, file_id: str, offset: int) -> None:
        """Delete the range, because it is damaged; absent is fine."""
        path = self._path(file_id, offset)
        with suppress(OSError):
            size_bytes = os.path.getsize(path)
            os.unlink(path)
            self._change_used(-size_bytes)

    def _path(self, file_id: str, offset: int) -> str:
        return os.path.join(self.folder, file_id[:2], f"{file_id}-{offset}")

    def _publish(self, path: str, data: memoryview) -> None:
        partial = f"{path}.partial-{uuid.uuid4().hex}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(partial, "xb", buffering=0) as file:
                written = 0
                while written < len(data):
                    written += file.write(data[written:])
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                os.unlink(partial)
            self._change_used(-len(data))
            raise

    def _reserve(self, size_bytes: int) -> bool:
        """Count ``size_bytes`` as used; False if there is no room and none can be made now."""
        if size_bytes > self.limit_bytes:
            return False
        return self._change_used(size_bytes) or (self._evict(size_bytes) and self._change_used(size_bytes))

    def _change_used(self, by_bytes: int) -> bool:
        """Add to the count that all processes share; False, and no change, if it would pass the limit."""
        with self._locked_count() as file:
            content = os.pread(file.fileno(), 32, 0)
            used_bytes = int(content) if content.isdigit() else sum(one.size_bytes for one in self._files())
            if used_bytes + by_bytes > self.limit_bytes:
                return False
            _write_count(file, used_bytes + by_bytes)
            return True

    @contextmanager
    def _locked_count(self) -> Iterator[io.FileIO]:
        # Somebody may have cleared the disk.
        os.makedirs(self.folder, exist_ok=True)
        with open(os.path.join(self.folder, _USED), "a+b", buffering=0) as file:
            # A lock of this handle, so it keeps out other threads of this process too.
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _evict(self, room_bytes: int) -> bool:
        """Delete least recently used files until there is room; False if another thread or process is doing it."""
        with open(os.path.join(self.folder, _EVICTION), "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            target_bytes = min(self.limit_bytes * _KEPT_SHARE, self.limit_bytes - room_bytes)
            files = sorted(self._files())
            kept_bytes = sum(one.size_bytes for one in files)
            for one in files:
                if kept_bytes <= target_bytes:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(one.path)
                kept_bytes -= one.size_bytes
            with self._locked_count() as file:
                _write_count(file, kept_bytes)
            return True

    def _files(self) -> Iterator[_File]:
        for folder in os.scandir(self.folder):
            if folder.is_dir(follow_symlinks=False):
                for entry in os.scandir(folder):
                    if _OURS.fullmatch(entry.name):
                        # Readers drop damaged files, other people clear disks.
                        with suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            yield _File(status.st_mtime, status.st_size, entry.path)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning("the disk tier in %s does not work (%s): reading goes on without it", self.folder, error)


def _write_count(file: io.FileIO, used_bytes: int) -> None:
    os.ftruncate(file.fileno(), 0)
    file.write(b"%d" % max(used_bytes, 0))


def _fill(buffer: memoryview, file: io.FileIO) -> int:
    num_read = 0
    while num_read < len(buffer) and (count := file.readinto(buffer[num_read:])):
        num_read += count
    return num_read
