"""Files on local disk that are complete or absent, even after a power cut."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from meteor.errors import AlreadyExistsError, InaccessibleError, NotFoundError, StorageError
from meteor.storage.exclusive import move_if_absent
from meteor.storage.place import ObjectInfo, check_size, is_partial, partial_name

_COPY_CHUNK_BYTES = 8 << 20
_NUM_FOLDER_ATTEMPTS = 5
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}
# Errors about one path, which say nothing about the disk.
_OF_ONE_FILE = {errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO}


def _open_regular(path: str, flags: int) -> int:
    """Open a file; a pipe would be waited for, and a device has no end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(path)
    return descriptor


class LocalFile:
    """The file at an absolute path (`Place`)."""

    def __init__(self, path: str) -> None:
        self.path = path

    def read(self, max_bytes: int | None) -> bytes:
        with open(self.path, "rb", opener=_open_regular) as file:
            check_size(self.path, os.fstat(file.fileno()).st_size, max_bytes)
            return file.read()

    def read_into(self, start: int, buffer: memoryview) -> int:
        # Unbuffered, so that the bytes go straight into the caller's buffer; the kernel may return fewer than asked for.
        num_read = 0
        with open(self.path, "rb", buffering=0, opener=_open_regular) as file:
            file.seek(start)
            while num_read < len(buffer) and (count := file.readinto(buffer[num_read:])):
                num_read += count
        return num_read

    def write(self, data: bytes | memoryview) -> None:
        self._publish(lambda file: file.write(data), os.replace)

    def create(self, data: bytes) -> None:
        self._publish(lambda file: file.write(data), move_if_absent)

    def upload(self, source: str) -> None:
        with open(source, "rb") as content:
            self._publish(lambda file: shutil.copyfileobj(content, file, _COPY_CHUNK_BYTES), os.replace)

    def _publish(self, fill: Callable[[BinaryIO], object], move: Callable[[str, str], None]) -> None:
        with partial_file(self.path) as partial:
            with open(partial, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            move(partial, self.path)
        _sync_folder(os.path.dirname(self.path))

    def download(self, target: str) -> None:
        shutil.copyfile(self.path, target)

    def stat(self) -> ObjectInfo:
        status = os.stat(self.path)
        if not stat.S_ISREG(status.st_mode):
            raise IsADirectoryError(self.path)
        # The inode's number is left out: some network file systems number a file anew on each machine, and replacing a file
        # by another changes the time as well.
        modified = str(status.st_mtime_ns)
        etag = f"{modified}-{status.st_ctime_ns}"
        return ObjectInfo(self.path, status.st_size, etag, status.st_mtime, modified)

    def delete(self) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path)

    def list(self) -> Iterator[ObjectInfo]:
        return (info for info in self._walk() if not is_partial(info.uri))

    def delete_empty_folders(self) -> None:
        for folder, _, _ in os.walk(self.path, topdown=False):
            with suppress(FileNotFoundError):
                _remove_folder(folder)

    def leftovers(self, older_than_s: float, dry_run: bool) -> Iterator[str]:
        oldest_kept_s = self.now_s() - older_than_s
        for info in self._walk():
            if is_partial(info.uri) and info.modified_s < oldest_kept_s:
                if not dry_run:
                    LocalFile(info.uri).delete()
                yield info.uri
        yield from self._empty_folders(oldest_kept_s, dry_run)

    def _empty_folders(self, oldest_kept_s: float, dry_run: bool) -> Iterator[str]:
        # The deepest folders come first, so that a folder of nothing but empty folders is empty in its turn.
        for folder, _, _ in os.walk(self.path, topdown=False):
            # Another process may use or remove a folder after the walk has found it.
            with suppress(FileNotFoundError):
                is_old = os.stat(folder).st_mtime < oldest_kept_s
                if folder != self.path and is_old and not os.listdir(folder) and (dry_run or _remove_folder(folder)):
                    yield f"{folder}/"

    def _walk(self) -> Iterator[ObjectInfo]:
        for folder, _, names in os.walk(self.path):
            for name in names:
                # Another process may delete a file after the walk has found its name.
                with suppress(FileNotFoundError):
                    yield LocalFile(os.path.join(folder, name)).stat()

    def now_s(self) -> float:
        folder = self.path
        while not os.path.isdir(folder):
            folder = os.path.dirname(folder)
        try:
            return _date_of_new_file(folder)
        except OSError as error:
            if error.errno not in _READ_ONLY:
                raise
            # Nothing can be written or deleted there, so ages are only shown.
            return time.time()


def _date_of_new_file(folder: str) -> float:
    path = os.path.join(folder, partial_name())
    try:
        with open(path, "xb", buffering=0) as file:
            # Some servers date a file only when data arrive; a full disk still dates it when it is made.
            with suppress(OSError):
                file.write(b"x")
                os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_mtime
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


@contextmanager
def disk_errors(uri: str) -> Iterator[None]:
    """Raise the operating system's errors as this library's, with the URI and a remedy."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"{uri} does not exist") from error
    except IsADirectoryError as error:
        raise NotFoundError(f"{uri} is a folder or a device, not a file") from error
    except FileExistsError as error:
        raise AlreadyExistsError(f"{uri} exists already") from error
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageError(
                f"{uri} cannot be written: {error.strerror}. No part of it was left behind; free space there or choose "
                "another folder, and start again: work that was finished before is kept"
            ) from error
        kind = InaccessibleError if error.errno in _OF_ONE_FILE else StorageError
        raise kind(f"{uri}: {error.strerror or error}") from error


@contextmanager
def partial_file(path: str) -> Iterator[str]:
    """Yield a new, empty file beside ``path``, to fill and then move; its name is removed at the end in every case."""
    folder = os.path.dirname(path)
    partial = os.path.join(folder, partial_name())
    try:
        _make_partial(partial)
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(f"{path} cannot be written: a file stands where its folder {folder} should be") from error
    try:
        yield partial
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)


def _make_partial(path: str) -> None:
    """Make an empty file, which also keeps its folder from being removed as empty, and the folder if necessary."""
    for attempt in range(1, _NUM_FOLDER_ATTEMPTS + 1):
        _make_folder(os.path.dirname(path))
        try:
            open(path, "xb").close()
            return
        except FileNotFoundError:
            # A clean-up removed the empty folder just now.
            if attempt == _NUM_FOLDER_ATTEMPTS:
                raise


def _remove_folder(folder: str) -> bool:
    try:
        os.rmdir(folder)
    except OSError as error:
        # A writer has just made a file in it.
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise
        return False
    return True


def _make_folder(folder: str) -> None:
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    try:
        os.mkdir(folder)
    except FileExistsError:
        # Another process made the folder in the meantime.
        if not os.path.isdir(folder):
            raise
    _sync_folder(parent)


def _sync_folder(folder: str) -> None:
    # Without this a new name may be lost in a power cut, although the file's bytes are safe.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems cannot sync a folder; they order names by other means.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)
