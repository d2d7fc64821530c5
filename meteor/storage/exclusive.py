"""Moves on local disk that fail if the new name exists, whereas a plain rename replaces the file."""

import ctypes
import errno
import os

from meteor.errors import StorageError

# Errors of `link` on file systems without hard links, such as exFAT and some in user space.
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
# Errors of `renameat2` on kernels or file systems that do not know the flag.
_NO_FLAG = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
# Constants of Linux (fcntl.h, linux/fs.h).
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


def move_if_absent(source: str, target: str) -> None:
    """Give a complete file the name ``target``, by a hard link or, where there are none, by Linux's exclusive rename.

    The source's name may remain.

    Raises:
        FileExistsError: the target exists.
        StorageError: the file system supports neither.
        OSError: the file cannot be moved for another reason.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename(source, target, error)


def _rename(source: str, target: str, without_links: OSError) -> None:
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        number = errno.ENOSYS
    else:
        if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
    if number not in _NO_FLAG:
        raise OSError(number, os.strerror(number), target)
    raise StorageError(
        f"{target} cannot be created: its file system has neither hard links ({without_links.strerror}) nor a rename that "
        f"spares an existing file ({os.strerror(number)}), so two jobs could overwrite each other's versions. Use another "
        "file system for this folder, such as ext4, XFS or NFS, or an object store"
    ) from without_links
