"""Publication of generated folders: a folder appears complete or not at all, and is not made twice."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from meteor.errors import AlreadyExistsError


def publish_folder(
    folder: Path, record_name: str, arguments: Mapping[str, Any], fill: Callable[[Path], Mapping[str, Any]]
) -> None:
    """Fill a temporary folder beside ``folder`` and rename it, unless the folder with these arguments exists already.

    The record (``arguments`` and the result of ``fill``, as JSON) is written last, so its existence means that the folder is
    complete. If another process publishes the folder first, that folder stays and the temporary folder is deleted.

    Args:
        folder: folder to publish.
        record_name: file name of the record.
        arguments: JSON values that identify the content.
        fill: function that writes the content into a folder and returns JSON values for the record.

    Raises:
        AlreadyExistsError: the folder holds something else.
    """
    if _is_finished(folder, record_name, arguments):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid4().hex}.tmp"
    temporary.mkdir()
    try:
        results = fill(temporary)
        record = json.dumps({"arguments": arguments, **results}, indent=2, sort_keys=True)
        (temporary / record_name).write_text(record + "\n", encoding="utf-8")
        _rename(temporary, folder, record_name, arguments)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename(temporary: Path, folder: Path, record_name: str, arguments: Mapping[str, Any]) -> None:
    try:
        # os.rename replaces an empty folder and fails on any other, so a finished folder is never overwritten.
        os.rename(temporary, folder)
    except OSError:
        if not _is_finished(folder, record_name, arguments):
            raise


def _is_finished(folder: Path, record_name: str, arguments: Mapping[str, Any]) -> bool:
    if not folder.exists() or not any(folder.iterdir()):
        return False
    record = folder / record_name
    if not record.exists():
        raise AlreadyExistsError(
            f"{folder} is not empty and has no {record_name}; choose another folder or delete this one."
        )
    found = json.loads(record.read_text(encoding="utf-8"))["arguments"]
    wanted = json.loads(json.dumps(arguments))
    if found != wanted:
        raise AlreadyExistsError(
            f"{folder} was made with {found}, not with {wanted}; choose another folder or delete this one."
        )
    return True
