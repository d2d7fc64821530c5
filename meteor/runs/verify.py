"""Verification of everything that runs wrote below a folder: every file is read, and compared with its checksum."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from meteor import storage
from meteor.checkpoint.format import MANIFEST, Checkpoint
from meteor.checksums import CHECKSUMS, damaged_files, read_checked_json
from meteor.errors import DamagedError, MeteorError
from meteor.projector.file import read_projector_file
from meteor.runs.reading import read_metrics

_CHECKED_JSON = {"run.json", "summary.json", "tracking.json", "study.json", "runs.json", "pins.json"}
_FOLDERS_OF_CHECKED_JSON = {"attempts", "pins", "damaged", "efficiency", "files"}
# Lists of checksums: of a stage or model, and of records and tokens of samples.
_LIST = re.compile(rf"{re.escape(CHECKSUMS)}|records-\d+\.json|tokens-[0-9a-f]+\.json")
# One check: the file that it is about, and the function that raises an error if the file is damaged.
_Check = tuple[str, Callable[[], Any]]


@dataclass
class Verified:
    """Outcome for one folder: of a stage, a model, a study, or pins.

    Attributes:
        uri: URI of the folder.
        num_checks: number of checks.
        problems: text for each check that failed.
    """

    uri: str
    num_checks: int = 0
    problems: list[str] = field(default_factory=list)


def verify(uri: str, on_progress: Callable[[int, int], None] | None = None) -> list[Verified]:
    """Check all files of runs below a folder; feature caches have a check of their own (`FeatureCache.verify`).

    Args:
        uri: output folder of runs, folder of a stage, model or checkpoint, or a projector file; local or s3://.
        on_progress: called with the number of checks that are done, and the number of all checks.

    Returns:
        An outcome for each folder that holds checked files.

    Raises:
        NotFoundError: there is nothing at the URI.
    """
    root = storage.absolute(uri)
    files = [info.uri for info in storage.list_objects(root)] or [storage.stat(root).uri]
    stages = sorted((storage.parent(file) for file in files if file.endswith("/run.json")), key=len)
    checks = [check for file in files for check in _checks_of(file)]
    found: dict[str, Verified] = {}
    for number, (file, check) in enumerate(checks, start=1):
        home = next((stage for stage in stages if file.startswith(f"{stage}/")), storage.parent(file))
        outcome = found.setdefault(home, Verified(home))
        outcome.num_checks += 1
        try:
            check()
        except MeteorError as error:
            outcome.problems.append(str(error))
        if on_progress is not None:
            on_progress(number, len(checks))
    return [found[home] for home in sorted(found)]


def _checks_of(file: str) -> Iterator[_Check]:
    """Yield the checks that a file asks for: of itself, and of the files that it lists."""
    folder, _, name = file.rpartition("/")
    above = folder.rpartition("/")[2]
    if _LIST.fullmatch(name):
        yield from _checks_of_list(file)
    elif name == MANIFEST and above.startswith("step_"):
        yield file, lambda: Checkpoint(folder).verify()
    elif name == "projector.safetensors":
        yield file, lambda: read_projector_file(file)
    elif name in _CHECKED_JSON or (name.endswith(".json") and above in _FOLDERS_OF_CHECKED_JSON):
        yield file, lambda: read_checked_json(file)
    if name == "run.json":
        yield file, lambda: read_metrics(folder)
    if name == "summary.json":
        yield file, lambda: storage.stat(storage.join(folder, CHECKSUMS))


def _checks_of_list(file: str) -> Iterator[_Check]:
    yield file, lambda: read_checked_json(file)
    try:
        content = read_checked_json(file)
    except DamagedError:
        # The check above tells.
        return
    for name in content["files"]:
        yield file, partial(_check_listed, storage.parent(file), content, name)


def _check_listed(folder: str, content: dict[str, Any], name: str) -> None:
    for problem in damaged_files(folder, content, [name]).values():
        raise DamagedError(f"{storage.join(folder, name)} {problem}")
