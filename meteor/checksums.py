"""Checksums of the files that a run writes, so that damaged bytes are found before they become numbers.

A JSON file of this project carries its own checksum under "crc32". Other files of a finished stage or model are listed, with
size and crc32, in the folder's ``checksums.json``, which is written when all of them are complete.
"""

import json
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from meteor import storage
from meteor.errors import DamagedError, NotFoundError

_LOG = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"
_FIELD = "crc32"
_BLOCK_BYTES = 16 << 20
_NUM_THREADS = 4
_NUM_SHOWN = 3


@dataclass(frozen=True)
class Checksum:
    """Size and crc32 of a file; eight hexadecimal digits."""

    size_bytes: int
    crc32: str


def checked_json_bytes(content: Mapping[str, Any]) -> bytes:
    """Encode JSON values as `storage.json_bytes` does, with their checksum under "crc32"."""
    # As a reader will see them: lists instead of tuples, and keys that are text, which decides about their order.
    plain = json.loads(storage.json_bytes(content))
    return storage.json_bytes({**plain, _FIELD: _crc32(storage.json_bytes(plain))})


def write_checked_json(uri: str, content: Mapping[str, Any]) -> None:
    """Write JSON values with their checksum, to be read by `read_checked_json`."""
    storage.write_bytes(uri, checked_json_bytes(content))


def read_checked_json(uri: str) -> dict[str, Any]:
    """Read a file of `write_checked_json`, without its checksum.

    Raises:
        NotFoundError: the file does not exist.
        DamagedError: the content is not what was written, or carries no checksum.
    """
    content = storage.read_json(uri)
    if not isinstance(content, dict) or _FIELD not in content:
        raise DamagedError(
            f"{uri} carries no checksum: it is damaged, was edited, or an older version of this project wrote it. Restore it, "
            "or delete it to repeat the work that it records"
        )
    wanted = content.pop(_FIELD)
    try:
        found = _crc32(storage.json_bytes(content))
    # Damage can make numbers and text that JSON's writer refuses.
    except ValueError:
        found = ""
    if found != wanted:
        raise DamagedError(
            f"{uri} is damaged: its content does not match its checksum. Restore it from a copy, or delete it to repeat the "
            "work that it records"
        )
    return content


def checksum(uri: str) -> Checksum:
    """Compute a file's checksum, block by block."""
    size_bytes, crc = storage.stat(uri).size_bytes, 0
    for start in range(0, size_bytes, _BLOCK_BYTES):
        crc = zlib.crc32(storage.read_range(uri, start, min(_BLOCK_BYTES, size_bytes - start)), crc)
    return Checksum(size_bytes, f"{crc:08x}")


def write_checksums(
    folder_uri: str,
    *,
    known: Mapping[str, Checksum] | None = None,
    leave_out: Callable[[str], bool] = lambda name: False,
    **facts: Any,
) -> None:
    """Write ``checksums.json`` for all files in and below a folder.

    Args:
        folder_uri: folder whose files are complete.
        known: name -> checksum of files that need not be read again.
        leave_out: function from a file's name to whether the list leaves the file out.
        **facts: more JSON values to keep beside the list.
    """
    root = storage.absolute(folder_uri)
    names = [info.uri.removeprefix(root).lstrip("/") for info in storage.list_objects(root)]
    names = [name for name in names if name != CHECKSUMS and not leave_out(name)]
    write_list(storage.join(root, CHECKSUMS), names, known=known, **facts)


def write_list(uri: str, names: Iterable[str], *, known: Mapping[str, Checksum] | None = None, **facts: Any) -> None:
    """Write a list of checksums as a file of its own, which `intact` reads.

    Args:
        uri: URI of the list.
        names: files in the list's folder.
        known: name -> checksum of files that need not be read again.
        **facts: more JSON values to keep in the list.
    """
    sums = dict(known or {})
    unknown = [name for name in names if name not in sums]
    sums |= zip(
        unknown, _in_threads(checksum, [storage.join(storage.parent(uri), name) for name in unknown]), strict=True
    )
    write_checked_json(uri, {**facts, "files": {name: asdict(value) for name, value in sums.items()}})


def intact(uri: str) -> dict[str, Any] | None:
    """Return a list of `write_list` if all its files are as they were written.

    Returns:
        The list with its facts; None if it does not exist. If the list or a file is damaged, the result is None too, and the
        log says so: this is for files that can be made again.
    """
    try:
        content = read_checked_json(uri)
        damaged = damaged_files(storage.parent(uri), content)
    except NotFoundError:
        return None
    except DamagedError as error:
        damaged = {uri: str(error)}
    if damaged:
        _LOG.warning(
            "%s and the files that it lists are made again, as some are damaged: %s", uri, "; ".join(damaged.values())
        )
        return None
    return content


def read_checksums(folder_uri: str) -> dict[str, Any] | None:
    """Read ``checksums.json``, with ``files`` and the facts of its writer; None if the folder has none."""
    try:
        return read_checked_json(storage.join(folder_uri, CHECKSUMS))
    except NotFoundError:
        return None


def damaged_files(folder_uri: str, content: Mapping[str, Any], names: Iterable[str] | None = None) -> dict[str, str]:
    """Return file -> problem for files that do not match a folder's list.

    Args:
        folder_uri: folder of the files.
        content: content of ``checksums.json``.
        names: files to check; None for all.
    """
    wanted = {name: Checksum(**value) for name, value in content["files"].items()}
    checked = list(wanted) if names is None else [name for name in names if name in wanted]

    def problem(name: str) -> str:
        uri = storage.join_below(folder_uri, name)
        try:
            size_bytes = storage.stat(uri).size_bytes
            if size_bytes != wanted[name].size_bytes:
                return f"has {size_bytes:,} bytes instead of {wanted[name].size_bytes:,}"
            return "" if checksum(uri) == wanted[name] else "does not match its checksum"
        except NotFoundError:
            return "is missing"

    found = dict(zip(checked, _in_threads(problem, checked), strict=True))
    return {name: text for name, text in found.items() if text}


def check_folder(folder_uri: str, names: Iterable[str] | None = None, *, is_required: bool = False) -> None:
    """Check the files of a folder against its ``checksums.json``.

    Args:
        folder_uri: folder of a finished stage or model.
        names: files to check; None for all.
        is_required: whether the list must exist; else a folder without it is not checked.

    Raises:
        DamagedError: a file is missing, has another size or other content; or the required list is missing.
    """
    content = read_checksums(folder_uri)
    if content is None and is_required:
        raise DamagedError(
            f"{folder_uri} lacks {CHECKSUMS}, so its files cannot be checked: restore it from a copy, or delete summary.json "
            "there and start the stage again"
        )
    damaged = damaged_files(folder_uri, content, names) if content else {}
    if damaged:
        some = "; ".join(f"{name} {problem}" for name, problem in list(damaged.items())[:_NUM_SHOWN])
        raise DamagedError(
            f"{folder_uri}: {len(damaged)} of its files are not as they were written: {some}. Restore the folder from a copy, "
            f"or repeat the stage that wrote it. If you changed a file on purpose, delete {CHECKSUMS} there"
        )


def _crc32(data: bytes) -> str:
    return f"{zlib.crc32(data):08x}"


def _in_threads(function: Callable[[str], Any], items: list[str]) -> list[Any]:
    if len(items) <= 1:
        return list(map(function, items))
    # Reading and crc32 leave the interpreter's lock, so that threads help.
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return list(pool.map(function, items))
