"""Makes a folder whole or not at all, and finds it finished the second time."""

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
    """Call ``fill`` on a temporary folder beside ``folder`` and rename it, unless the same work lies there already.

    The record (``arguments`` and what ``fill`` returned, as JSON) is written last, so its existence means complete.
    If another process publishes the same work first, its folder stays and this one is thrown away.

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
        # Replaces an empty folder, fails on any other.
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
            f"{folder} was made with {found}, wanted is {wanted}; choose another folder or delete this one."
        )
    return True
