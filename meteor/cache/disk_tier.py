"""Disk tier: payloads read from S3 stay as files on the node's disk until the least recently used are deleted.

All processes of a node share a folder. A file's name identifies its bytes, as data files never change, so no file becomes
stale. Readers check the bytes. A lost file or folder costs only time.
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
from meteor.home import expand_home

_LOG = logging.getLogger(__name__)
# The tier deletes only files with such names in this subfolder of the configured folder.
_FOLDER = "meteor-features"
_OURS = re.compile(r"[0-9a-f]{32}-\d+(\.partial-[0-9a-f]{32})?")
_USED, _EVICTION = "used_bytes", "eviction.lock"
# Share of the limit that an eviction keeps. It must list every file, so it deletes many at once.
_KEPT_SHARE = 0.9
# A read updates a file's time of use at most this often, to save writes.
_TOUCH_AFTER_S = 60
_PAUSE_AFTER_FAILURE_S = 60


class _File(NamedTuple):
    used_at: float
    size_bytes: int
    path: str


class DiskTier:
    """Byte ranges of data files on disk, limited in total size; safe to share between threads and processes.

    All processes share a count of the used bytes, which every eviction corrects. During an eviction, files that other
    processes are writing may exceed the limit.

    Args:
        folder: folder on a disk of this node, made if it does not exist.
        limit_bytes: most bytes of all files together.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: str, limit_bytes: int) -> None:
        self.folder = os.path.join(os.path.abspath(expand_home(folder)), _FOLDER)
        self.limit_bytes = limit_bytes
        self._given_folder = folder
        self._warned = False
        self._write_again_at = 0.0
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"{self.folder} cannot hold the disk tier ({error.strerror}); set cache.disk_tier to a folder on a "
                "disk of this node, or leave it empty"
            ) from error

    def __reduce__(self) -> tuple[type["DiskTier"], tuple[str, int]]:
        return DiskTier, (self._given_folder, self.limit_bytes)

    def read_into(self, file_id: str, offset: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` with a stored range; return False if the range is absent or cut short.

        Args:
            file_id: the data file's unique name, 32 hexadecimal digits.
            offset: start of the range in the data file.
            buffer: memory of the range's size.
        """
        path = self._path(file_id, offset)
        try:
            with open(path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size == len(buffer) == _fill(buffer, file):
                    # The modification time serves as time of use, because many disks are mounted without access times.
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
        """Store the range for later readers, unless the disk is full or another process is evicting files."""
        if time.monotonic() < self._write_again_at:
            return
        path = self._path(file_id, offset)
        try:
            if not os.path.exists(path) and self._reserve(len(data)):
                self._publish(path, data)
        except OSError as error:
            # The tier only saves time, so its failures must not stop a run.
            # If the folder was deleted or other files fill the disk, reading continues from the origin.
            self._write_again_at = time.monotonic() + _PAUSE_AFTER_FAILURE_S
            self._warn(error)

    def drop(self, file_id: str, offset: int) -> None:
        """Delete a damaged range if it exists."""
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
            # A rename is atomic: readers see the whole file or none. There is no fsync, because a lost file costs only time.
            os.replace(partial, path)
        except OSError:
            with suppress(OSError):
                os.unlink(partial)
            self._change_used(-len(data))
            raise

    def _reserve(self, size_bytes: int) -> bool:
        """Count ``size_bytes`` as used; return False if they do not fit and no files can be evicted now."""
        if size_bytes > self.limit_bytes:
            return False
        return self._change_used(size_bytes) or (self._evict(size_bytes) and self._change_used(size_bytes))

    def _change_used(self, by_bytes: int) -> bool:
        """Add to the count that all processes share; return False without a change if it would exceed the limit."""
        with self._locked_count() as count:
            content = os.pread(count.fileno(), 32, 0)
            used_bytes = int(content) if content.isdigit() else sum(file.size_bytes for file in self._files())
            if used_bytes + by_bytes > self.limit_bytes:
                return False
            _write_count(count, used_bytes + by_bytes)
            return True

    @contextmanager
    def _locked_count(self) -> Iterator[io.FileIO]:
        # A person may have cleared the disk.
        os.makedirs(self.folder, exist_ok=True)
        with open(os.path.join(self.folder, _USED), "a+b", buffering=0) as file:
            # `flock` locks this open file, so it also keeps out other threads of this process.
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _evict(self, needed_bytes: int) -> bool:
        """Delete least recently used files until enough bytes are free; return False if an eviction is running."""
        with open(os.path.join(self.folder, _EVICTION), "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            target_bytes = min(self.limit_bytes * _KEPT_SHARE, self.limit_bytes - needed_bytes)
            files = sorted(self._files())
            kept_bytes = sum(file.size_bytes for file in files)
            for file in files:
                if kept_bytes <= target_bytes:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(file.path)
                kept_bytes -= file.size_bytes
            with self._locked_count() as count:
                _write_count(count, kept_bytes)
            return True

    def _files(self) -> Iterator[_File]:
        for folder in os.scandir(self.folder):
            if folder.is_dir(follow_symlinks=False):
                for entry in os.scandir(folder):
                    if _OURS.fullmatch(entry.name):
                        # A reader may drop a damaged file in the meantime, or a person may clear the disk.
                        with suppress(FileNotFoundError):
                            status = entry.stat(follow_symlinks=False)
                            yield _File(status.st_mtime, status.st_size, entry.path)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            _LOG.warning("the disk tier in %s does not work (%s): reading continues without it", self.folder, error)


def _write_count(file: io.FileIO, used_bytes: int) -> None:
    os.ftruncate(file.fileno(), 0)
    file.write(b"%d" % max(used_bytes, 0))


def _fill(buffer: memoryview, file: io.FileIO) -> int:
    num_read = 0
    while num_read < len(buffer) and (count := file.readinto(buffer[num_read:])):
        num_read += count
    return num_read
